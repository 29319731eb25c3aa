"""The solver's answer: where every layer runs, and in how many micro-batches."""

from dataclasses import dataclass

from planner.layouts import Grid, Layout
from planner.schedules import Schedule

__all__ = ["Candidate", "Placement", "Solution", "Split"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Split:
    """Which layers form which stage, and which stages run forward again before backward."""

    boundaries: tuple[int, ...]
    """Stage s holds layers boundaries[s] .. boundaries[s + 1] - 1; length num_stages + 1."""
    recompute: tuple[bool, ...]
    """Per stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Everything that the schedule and the lowering need to know."""

    num_replicas: int
    num_pipeline_ranks: int
    boundaries: tuple[int, ...]
    """Stage s holds layers boundaries[s] .. boundaries[s + 1] - 1; length num_stages + 1."""
    stage_ranks: tuple[int, ...]
    """Pipeline rank of each stage: most often s mod num_pipeline_ranks."""
    micro_batch_size: int
    num_micro_batches: int
    """Per replica and step."""
    partition: int
    """What each replica holds only a part of: 0 nothing; 1 the optimizer's state; 2 the reduced
    gradients as well; 3 the weights as well."""
    recompute: tuple[bool, ...]
    """Per stage: keep only its inputs, and run forward again before backward."""
    num_weight_buffers: int = 2
    """Gather buffers shared by a rank's stages (partition 3)."""
    num_gradient_buffers: int = 2
    """Gradient buffers shared by a rank's stages."""
    schedule: Schedule = Schedule.LAYERED
    group_size: int = 0
    """Micro-batches that go through a stage together under the hybrid schedule."""
    offload_state: bool = False
    """Keep shards and moments in host memory."""
    offload_inputs: bool = False
    """Move stored stage inputs to host memory between forward and backward."""
    layout: Layout = Layout.REPLICAS_INSIDE
    """Which neighbours share hosts. The same with one replica or one pipeline rank."""
    partition_group_size: int = 0
    """Consecutive replicas that divide the state among them, as all other groups do; 0: all."""

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def num_parts(self) -> int:
        """Of the state; 1 where nothing is partitioned."""
        return self.grid.num_parts if self.partition else 1

    @property
    def is_modular(self) -> bool:
        """Whether stage s is on rank s mod P, and every rank has as many."""
        rounds, rest = divmod(self.num_stages, self.num_pipeline_ranks)
        return not rest and self.stage_ranks == tuple(range(self.num_pipeline_ranks)) * rounds

    @property
    def world_size(self) -> int:
        return self.num_replicas * self.num_pipeline_ranks

    @property
    def global_batch_size(self) -> int:
        return self.num_replicas * self.num_micro_batches * self.micro_batch_size

    @property
    def grid(self) -> Grid:
        """Which world rank is which replica's which pipeline rank."""
        return Grid(
            num_replicas=self.num_replicas,
            num_pipeline_ranks=self.num_pipeline_ranks,
            layout=self.layout,
            partition_group_size=self.partition_group_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One setting of the discrete choices, and what became of it."""

    num_replicas: int
    num_pipeline_ranks: int
    stages_per_rank: int
    """Of the rank with most, where they differ."""
    micro_batch_size: int
    num_micro_batches: int
    partition: int
    recompute: bool | None
    """None: decided per stage."""
    offload_state: bool
    offload_inputs: bool
    num_buffers: int
    layout: Layout
    verdict: str
    """`best`, `simulated`, `estimated` (its best known split is slower), `bounded` (its lower bound
    exceeds the best), `not tried: why`, `not simulated: why`, `infeasible: why`."""
    bound_seconds: float
    """Infinite where the model cannot be traced with the micro-batch size."""
    step_seconds: float | None = None
    """Simulated; None where pruned or infeasible."""
    assignment: tuple[int, ...] = ()
    """Pipeline rank of each stage; empty: stage s on rank s mod P, as many on every rank."""
    partition_group_size: int = 0
    """Replicas that divide a partitioned state among them; 0: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A placement and its certificate."""

    placement: Placement
    step_seconds: float
    """Simulated step time of the placement."""
    objective_seconds: float
    """The solver's objective for it (the step-time model that CP-SAT minimises)."""
    bound_seconds: float
    """No layered plan of these layers in this order, with stage s on rank s mod P, is simulated to
    take less: any mesh, batching, split, partition, recompute, offload, pools and layout, tried or
    not. The batch is given."""
    solve_seconds: float
    """Of the search; tracing and profiling the micro-batch sizes is not included."""
    uniform_seconds: float | None
    """Simulated step time of the equal-count split of the same mesh; None if it does not fit. The
    step-time model's, if the time was up and it is clearly slower."""
    greedy_seconds: float | None
    """The same for the greedy split (fill each stage to the mean)."""
    candidates: tuple[Candidate, ...]
    layered_seconds: float | None = None
    """Simulated step of the best layered plan, where the placement's other schedule is faster.
    Objective and bound are those of layered plans."""
    is_interrupted: bool = False
    """The user ended the search: it is the best so far."""
    modular_seconds: float | None = None
    """Simulated step of the best layered plan with stage s on rank s mod P, where one with stages
    on other ranks is faster. Objective and bound are those of such plans."""
    traced_order_seconds: float | None = None
    """Simulated step of the best plan with the layers in the order traced, where one with another
    order is faster. Objective and bound are those of the order traced."""
    any_order_seconds: float | None = None
    """No plan of these layers in this order is simulated to take less, whatever its schedule; where
    the placement's is another than the layered one."""

    @property
    def certified_seconds(self) -> float:
        """Simulated step of the plan that the bound speaks of."""
        return (
            self.modular_seconds
            or self.traced_order_seconds
            or self.layered_seconds
            or self.step_seconds
        )

    @property
    def gap(self) -> float:
        """(certified - bound) / certified, 0 where proved optimal."""
        return max(0.0, 1.0 - self.bound_seconds / self.certified_seconds)
