"""One split problem in whole numbers: everything that depends on where the cuts lie.

Times are counted in ticks and memory in units, so that the dynamic programme, the local search,
CP-SAT and a brute force agree to the last digit. A stage's cost is a difference of prefix sums.
This module knows the tables and how they are read. It does not know where the figures come from.
"""

import itertools
from dataclasses import dataclass, field

from planner.solve.choices import Choice
from planner.solve.memory import num_buffers
from planner.solve.pace import Pace, StageTicks, step_time

__all__ = [
    "Instance",
    "overflow_units",
    "rank_units",
    "stage_ticks",
    "step_ticks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Tables over layers or cuts; prefix sums and cut tables have num_layers + 1 entries."""

    choice: Choice
    num_layers: int
    tick_seconds: float
    unit_bytes: int
    forward: tuple[int, ...]
    """Prefix sum: ticks of one micro-batch."""
    backward: tuple[int, ...]
    """Prefix sum: ticks of one micro-batch, a second forward not included."""
    update: tuple[int, ...]
    """Prefix sum: ticks of the optimizer's update."""
    least_update: int
    """Ticks that the update of a stage takes at least."""
    gather: tuple[int, ...]
    """Prefix sum: ticks to gather the weights; 0 where they are not partitioned."""
    reduce: tuple[int, ...]
    """Prefix sum: ticks to reduce the gradients; 0 with one replica."""
    gather_per_stage: int
    """Ticks of latency."""
    reduce_per_stage: int
    tied_ticks: int
    """To add gradients of tied weights between ranks, after everything else."""
    hops: tuple[tuple[int, ...], ...]
    """Per kind of link and cut: ticks to send one micro-batch's tensors."""
    gradient_hops: tuple[tuple[int, ...], ...]
    """The same for the gradients on their way back."""
    hop_kinds: tuple[int, ...]
    """Kind of link from each pipeline rank to the next one in the ring."""
    entry: tuple[int, ...]
    """Per cut: ticks of compute that a stage beginning there loses to receiving a micro-batch."""
    exit: tuple[int, ...]
    """Per cut: ticks of compute that a stage ending there loses to sending a micro-batch on."""
    gradient_entry: tuple[int, ...]
    """Per cut: as entry, for the gradients that the stage sends back."""
    gradient_exit: tuple[int, ...]
    """Per cut: as exit, for the gradients that the stage receives."""
    kept: tuple[int, ...]
    """Prefix sum: units of state and activations. A stage [i, j) keeps
    kept[j] - kept[i] + entry_kept[i] - exit_unkept[j]."""
    entry_kept: tuple[int, ...]
    """Per cut: units of earlier layers' tensors that a stage beginning there keeps."""
    exit_unkept: tuple[int, ...]
    """Per cut: units that a stage ending there does not keep after all."""
    buffer: tuple[int, ...]
    """Prefix sum: units of gather and gradient buffers; the largest stage of a rank counts."""
    rebuilt: tuple[int, ...]
    """Prefix sum: units that one recomputed micro-batch holds; the largest stage counts."""
    rebuilt_exit_unkept: tuple[int, ...]
    """Per cut: as exit_unkept, of the recomputed micro-batch."""
    fixed_units: tuple[int, ...]
    """Per pipeline rank: whatever the cuts do not change."""
    limit_units: tuple[int, ...]
    """Per pipeline rank."""
    turn: tuple[int, ...] = field(init=False)
    """Prefix sum: ticks of one micro-batch's backward, recompute included."""
    time: tuple[int, ...] = field(init=False)
    """Prefix sum: ticks of one micro-batch in both directions, recompute included."""

    def __post_init__(self) -> None:
        # Made once: the local search asks for them with every split it tries.
        turn = tuple(map(sum, zip(self.rebuild, self.backward, strict=True)))
        object.__setattr__(self, "turn", turn)
        object.__setattr__(self, "time", tuple(map(sum, zip(self.forward, turn, strict=True))))

    @property
    def rebuild(self) -> tuple[int, ...]:
        """Prefix sum: ticks of the second forward, 0 where nothing is recomputed."""
        return self.forward if self.choice.recompute else (0,) * len(self.forward)

    @property
    def pace(self) -> Pace:
        choice = self.choice
        return Pace(
            num_ranks=choice.num_pipeline_ranks,
            num_micro_batches=choice.num_micro_batches,
            gathers=choice.partition == 3,
            reduces=choice.num_replicas > 1,
            num_weight_buffers=num_buffers(choice),
        )

    def hop_kind(self, stage: int) -> int:
        """Kind of the link over which `stage` receives from the stage before."""
        return self.hop_kinds[(stage - 1) % len(self.hop_kinds)]


def step_ticks(instance: Instance, boundaries: tuple[int, ...]) -> int:
    """The step-time model's answer for a split (see `planner.solve.pace`)."""
    ticks: int = step_time(stage_ticks(instance, boundaries), instance.pace, _latest)
    return ticks + instance.tied_ticks


def _latest(*moments: int) -> int:
    return max(moments)


def stage_ticks(instance: Instance, boundaries: tuple[int, ...]) -> list[StageTicks]:
    """What each stage of a split takes."""
    stages = []
    for stage, (first, end) in enumerate(itertools.pairwise(boundaries)):
        kind = instance.hop_kind(stage)
        forward = instance.forward[end] - instance.forward[first]
        forward += instance.entry[first] + instance.exit[end]
        backward = instance.backward[end] - instance.backward[first]
        update = instance.update[end] - instance.update[first]
        stages.append(
            StageTicks(
                forward=forward,
                # The simulator takes a stage's predicted forward for it, transfers included.
                rebuild=forward if instance.choice.recompute else 0,
                backward=backward + instance.gradient_entry[first] + instance.gradient_exit[end],
                arrival=instance.hops[kind][first] if stage else 0,
                gradient_arrival=instance.gradient_hops[kind][first] if stage else 0,
                gather=instance.gather[end] - instance.gather[first] + instance.gather_per_stage,
                reduce=instance.reduce[end] - instance.reduce[first] + instance.reduce_per_stage,
                update=max(update, instance.least_update),
            )
        )
    return stages


def rank_units(instance: Instance, boundaries: tuple[int, ...]) -> list[int]:
    """Peak memory of each pipeline rank in units, by the memory model."""
    ranks = instance.choice.num_pipeline_ranks
    units = list(instance.fixed_units)
    buffers, rebuilt = [0] * ranks, [0] * ranks
    for stage in range(instance.choice.num_stages):
        rank, first, end = stage % ranks, boundaries[stage], boundaries[stage + 1]
        units[rank] += instance.kept[end] - instance.kept[first]
        units[rank] += instance.entry_kept[first] - instance.exit_unkept[end]
        buffers[rank] = max(buffers[rank], instance.buffer[end] - instance.buffer[first])
        rebuilt[rank] = max(
            rebuilt[rank],
            instance.rebuilt[end] - instance.rebuilt[first] - instance.rebuilt_exit_unkept[end],
        )
    return [sum(parts) for parts in zip(units, buffers, rebuilt, strict=True)]


def overflow_units(instance: Instance, boundaries: tuple[int, ...]) -> tuple[int, int]:
    """Largest and summed excess over the ranks' limits; (0, 0) where all fit."""
    excess = [
        max(0, units - limit)
        for units, limit in zip(rank_units(instance, boundaries), instance.limit_units, strict=True)
    ]
    return max(excess), sum(excess)
