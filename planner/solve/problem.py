"""What the solver is asked, and what a simulation tells it.

This module knows the question. It does not know how it is answered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from planner.cluster.types import Cluster
from planner.graph import LayerGraph
from planner.partitions import updates_on_host
from planner.profile import Profile
from planner.schedules import Schedule

__all__ = ["Constraints", "Problem", "Simulated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Choices that the user has made; None leaves the choice to the solver."""

    num_replicas: int | None = None
    num_pipeline_ranks: int | None = None
    stages_per_rank: int | None = None
    micro_batch_size: int | None = None
    num_micro_batches: int | None = None
    """Per replica and step."""
    partition: int | None = None
    """0 to 3."""
    partition_within: int | Literal["host"] | None = None
    """Replicas of a pipeline rank that divide a partitioned state among them, as every other so
    many do: a number of them, or those that share a host; None: all, or those of a host."""
    recompute: bool | None = None
    """Of all stages, or of none."""
    offload_state: bool | None = None
    offload_inputs: bool | None = None
    num_buffers: int | None = None
    """Size of the pools of weight and of gradient buffers."""
    schedule: Schedule | None = None
    """`planner.solve` knows the layered one alone."""
    modular: Literal[True] | None = None
    """Stage s on pipeline rank s mod P, and as many on every rank."""
    update_on_host: Literal[True] | None = None
    """Updates run on the host, so that shards and optimizer state stay there."""

    def allows(self, partition: int, *, offload_state: bool) -> bool:
        """Whether the state may live so."""
        if self.update_on_host and not updates_on_host(partition, offload_state=offload_state):
            return False
        return self.partition in (None, partition) and self.offload_state in (None, offload_state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A model, a cluster, a batch, and what is already decided."""

    graph_at: Callable[[int], LayerGraph]
    """By micro-batch size. The layers are the same at every size. The caller caches."""
    profile_at: Callable[[int], Profile]
    """By micro-batch size. The caller caches."""
    cluster: Cluster
    num_devices: int
    global_batch_size: int
    """Samples per optimizer step, over all replicas."""
    constraints: Constraints = field(default_factory=Constraints)
    optimizer_slots: int = 2
    """Tensors per parameter that the optimizer keeps (AdamW: 2)."""
    update_slots_of_each: float = 0.0
    """What it makes while it updates: tensors as large as the parameter that has its turn."""
    update_slots_of_previous: float = 0.0
    """As large as the parameter before."""
    update_slots_of_all: float = 0.0
    """As large as all parameters of a stage."""
    updates_wait: bool = False
    """Whether all updates stand at the end of the step (clipping, finite check), so that gradients
    wait for them in memory."""
    num_verdicts: int = 1
    """How often all gradients are looked at before those updates, where they wait."""
    memory_limit_bytes: int | None = None
    """Per device; None: the device's memory less what is reserved."""
    time_limit_seconds: float = 20.0
    """For the search, simulations included; tracing and profiling the micro-batch sizes, which a
    model of a hundred layers needs seconds for, is not."""
    seed: int = 0

    @property
    def updates_on_host(self) -> bool:
        return self.constraints.update_on_host is True


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What the simulator says of one placement."""

    step_seconds: float
    peak_bytes: tuple[int, ...]
    """Per pipeline rank."""
    host_lack_bytes: int = 0
    """What the fullest host lacks for what its devices offload to it."""

    def fits(self, limit_bytes: Sequence[int]) -> bool:
        """Whether every pipeline rank stays within its limit, and the hosts hold the rest."""
        peaks = zip(self.peak_bytes, limit_bytes, strict=True)
        return not self.host_lack_bytes and all(peak <= limit for peak, limit in peaks)
