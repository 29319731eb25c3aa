"""What is predicted, and of what."""

import math
from dataclasses import dataclass, fields

from planner.schedules import Schedule
from planner.simulate.types import MemoryByClass

__all__ = ["ONE_STAGE", "Breakdown", "Configuration", "Predicted"]

ONE_STAGE = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)
"""Schedules with one stage per rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A way to train: D replicas x P pipeline ranks x T tensor-parallel devices, and a batch."""

    num_replicas: int = 1
    num_pipeline_ranks: int = 1
    tensor_degree: int = 1
    """Consecutive devices of a host that divide every layer."""
    stages_per_rank: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    """Per replica and step."""
    schedule: Schedule = Schedule.LAYERED
    recompute: bool = False
    partition: int = 0
    """0: every replica holds the whole state; 3: weights, gradients and optimizer are sharded."""
    boundaries: tuple[int, ...] | None = None
    """First layer of each stage, and the number of layers; None: split as evenly as can be."""
    group_size: int = 0
    """Micro-batches that go through a stage together under the hybrid schedule."""

    @property
    def num_devices(self) -> int:
        return self.num_replicas * self.num_pipeline_ranks * self.tensor_degree

    @property
    def global_batch_size(self) -> int:
        return self.num_replicas * self.num_micro_batches * self.micro_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Seconds of a step, as means over the pipeline ranks: they add up to the step."""

    compute_seconds: float
    """Forward, backward, recompute and copies within the device."""
    tensor_seconds: float
    """All-reduces between tensor-parallel devices: nothing hides them."""
    update_seconds: float
    exposed_seconds: float
    """Waiting that gathers, reductions, and pipeline transfers explain."""
    idle_seconds: float
    """The rest: the pipeline's bubble, and the end of the step."""

    @property
    def total_seconds(self) -> float:
        return math.fsum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One configuration's step."""

    configuration: Configuration
    boundaries: tuple[int, ...]
    step_seconds: float
    breakdown: Breakdown
    memory: tuple[MemoryByClass, ...]
    """Per pipeline rank: each of its devices at its worst moment."""
    memory_limit_bytes: int
    """Of the smallest device."""

    @property
    def peak_bytes(self) -> int:
        """Of the pipeline rank that needs most."""
        return max(moment.total_bytes for moment in self.memory)

    @property
    def missing_bytes(self) -> int:
        """Beyond the limit; 0 where it fits."""
        return max(0, self.peak_bytes - self.memory_limit_bytes)
