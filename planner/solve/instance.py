"""One split problem in whole numbers: everything that depends on where the cuts lie.

Times are counted in ticks and memory in units, so that the dynamic programme, the local search,
CP-SAT and a brute force agree to the last digit. A stage's cost is a difference of prefix sums.
This module knows the tables and how they are read. It does not know where the figures come from.
"""

import itertools
from dataclasses import dataclass

from planner.solve.choices import Choice
from planner.solve.memory import num_buffers
from planner.solve.pace import Pace, StageTicks, step_time

__all__ = [
    "Instance",
    "largest_layer",
    "least_rank_units",
    "least_step_ticks",
    "overflow_units",
    "rank_units",
    "smallest_layers",
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

    @property
    def time(self) -> tuple[int, ...]:
        """Prefix sum: ticks of one micro-batch in both directions, recompute included."""
        return tuple(f + b for f, b in zip(self.forward, self.turn, strict=True))

    @property
    def turn(self) -> tuple[int, ...]:
        """Prefix sum: ticks of one micro-batch's backward, recompute included."""
        pairs = zip(self.rebuild, self.backward, strict=True)
        return tuple(rebuild + backward for rebuild, backward in pairs)

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
    stages, rebuild = [], instance.rebuild
    for stage, (first, end) in enumerate(itertools.pairwise(boundaries)):
        kind = instance.hop_kind(stage)
        stages.append(
            StageTicks(
                forward=instance.forward[end] - instance.forward[first],
                rebuild=rebuild[end] - rebuild[first],
                backward=instance.backward[end] - instance.backward[first],
                arrival=instance.hops[kind][first] if stage else 0,
                gradient_arrival=instance.gradient_hops[kind][first] if stage else 0,
                gather=instance.gather[end] - instance.gather[first] + instance.gather_per_stage,
                reduce=instance.reduce[end] - instance.reduce[first] + instance.reduce_per_stage,
                update=instance.update[end] - instance.update[first],
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


def least_step_ticks(instance: Instance) -> int:
    """A step time that no split of this instance can undercut (memory left aside).

    Three paths that every split has: one micro-batch through all stages while the others wait
    for the longest; the busiest rank's compute, after the shortest possible fill and before the
    shortest drain, or up to its own last update; the data stream of the rank with most traffic.
    """
    choice = instance.choice
    ranks, stages, count = choice.num_pipeline_ranks, choice.num_stages, choice.num_micro_batches
    hops = [min(table[1:-1], default=0) for table in instance.hops]
    gradient_hops = [min(table[1:-1], default=0) for table in instance.gradient_hops]
    kinds = [instance.hop_kind(stage) for stage in range(1, stages)]
    there = [hops[kind] for kind in kinds]
    back = [gradient_hops[kind] for kind in kinds]
    fill = sorted(there)[: ranks - 1] + smallest_layers(instance.forward, ranks - 1)
    drain = sorted(back)[: ranks - 1] + smallest_layers(instance.backward, ranks - 1)
    start = instance.gather[1] + instance.gather_per_stage if choice.partition == 3 else 0
    end = instance.update[1] + instance.reduce[1] + instance.reduce_per_stage

    longest = [
        max(largest_layer(table), -(-table[-1] // stages))
        for table in (instance.forward, instance.turn)
    ]
    chain = (
        instance.forward[-1]
        + instance.backward[-1]
        + (count - 1) * sum(longest)
        + sum(there)
        + sum(back)
    )

    # While the pipeline drains, the first micro-batch of a rank's last stage is rebuilt unnoticed.
    pairs = zip(instance.time, instance.rebuild, strict=True)
    compute = tuple(count * time - rebuild for time, rebuild in pairs)
    updated = tuple(map(sum, zip(compute, instance.update, strict=True)))
    busiest = max(largest_layer(compute), -(-compute[-1] // ranks))
    busiest_updated = max(largest_layer(updated), -(-updated[-1] // ranks))

    gathers = instance.gather[-1] + stages * instance.gather_per_stage
    reductions = instance.reduce[-1] + stages * instance.reduce_per_stage
    traffic = -(-(gathers + reductions) // ranks)
    return instance.tied_ticks + max(
        start + chain + end,
        start + sum(fill) + busiest + sum(drain) + end,
        sum(fill) + busiest_updated,
        traffic,
    )


def smallest_layers(prefix: tuple[int, ...], number: int) -> list[int]:
    """The smallest differences of neighbours in a prefix sum."""
    return sorted(end - first for first, end in itertools.pairwise(prefix))[:number]


def largest_layer(prefix: tuple[int, ...]) -> int:
    """Largest difference of neighbours in a prefix sum."""
    return max(end - first for first, end in itertools.pairwise(prefix))


def least_rank_units(instance: Instance) -> int:
    """Memory that the fullest rank cannot go below under any split.

    It is at least the mean over ranks, and at least what the largest layer takes alone.
    """
    pairs = zip(instance.entry_kept[1:-1], instance.exit_unkept[1:-1], strict=True)
    cheapest_cut = min((entry - unkept for entry, unkept in pairs), default=0)
    kept = instance.kept[-1] + (instance.choice.num_stages - 1) * cheapest_cut
    total = sum(instance.fixed_units) + kept + largest_layer(instance.buffer)
    alone = max(
        instance.kept[end]
        - instance.kept[first]
        - instance.exit_unkept[end]
        + instance.buffer[end]
        - instance.buffer[first]
        for first, end in itertools.pairwise(range(instance.num_layers + 1))
    )
    return max(-(-total // instance.choice.num_pipeline_ranks), alone + min(instance.fixed_units))
