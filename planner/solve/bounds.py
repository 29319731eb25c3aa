"""What no split of an instance can undercut, in time and in memory.

These bounds cost next to nothing. They leave most choices out of the search before any split of
them is made, so they must hold: for the step-time model, and for the simulator, which follows it.
This module knows the Instance alone.
"""

import itertools

from planner.solve.instance import Instance

__all__ = ["least_rank_units", "least_step_ticks"]


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
    fill = sorted(there)[: ranks - 1] + _smallest_layers(instance.forward, ranks - 1)
    drain = sorted(back)[: ranks - 1] + _smallest_layers(instance.backward, ranks - 1)
    start = instance.gather[1] + instance.gather_per_stage if choice.partition == 3 else 0
    end = max(instance.update[1], instance.least_update)
    end += instance.reduce[1] + instance.reduce_per_stage

    # Messages that no split avoids, of one micro-batch in both directions.
    inner = stages - 1
    sent = inner * (_least(instance.entry) + _least(instance.exit))
    returned = inner * (_least(instance.gradient_entry) + _least(instance.gradient_exit))
    rebuilt = sent if choice.recompute else 0

    longest = [
        max(_largest_layer(instance.forward), -(-(instance.forward[-1] + sent) // stages)),
        max(_largest_layer(instance.turn), -(-(instance.turn[-1] + returned + rebuilt) // stages)),
    ]
    chain = (
        instance.forward[-1]
        + instance.backward[-1]
        + sent
        + returned
        + (count - 1) * sum(longest)
        + sum(there)
        + sum(back)
    )

    busiest = -(-(_least_compute(instance) + count * (sent + returned)) // ranks)
    updates = max(instance.update[-1], stages * instance.least_update)
    busiest_updated = -(-(_least_compute(instance) + count * (sent + returned) + updates) // ranks)
    largest = count * _largest_layer(instance.time) - _largest_layer(instance.rebuild)

    gathers = instance.gather[-1] + stages * instance.gather_per_stage
    reductions = instance.reduce[-1] + stages * instance.reduce_per_stage
    traffic = -(-(gathers + reductions) // ranks)
    return instance.tied_ticks + max(
        start + chain + end,
        start + sum(fill) + max(busiest, largest) + sum(drain) + end,
        sum(fill) + busiest_updated,
        traffic,
    )


def _least_compute(instance: Instance) -> int:
    """Ticks of all ranks' compute that delay the step, messages not included.

    While the pipeline drains, the first micro-batch of a rank's last stage is rebuilt unnoticed;
    nothing drains on one rank. All other stages hold a layer each at least.
    """
    choice, rebuild = instance.choice, instance.rebuild
    compute = choice.num_micro_batches * instance.time[-1]
    if choice.num_pipeline_ranks == 1:
        return compute
    others = choice.num_stages - choice.num_pipeline_ranks
    return compute - rebuild[-1] + sum(_smallest_layers(rebuild, others))


def _least(cuts: tuple[int, ...]) -> int:
    """Of the cuts between two layers."""
    return min(cuts[1:-1], default=0)


def _smallest_layers(prefix: tuple[int, ...], number: int) -> list[int]:
    """The smallest differences of neighbours in a prefix sum."""
    return sorted(end - first for first, end in itertools.pairwise(prefix))[:number]


def _largest_layer(prefix: tuple[int, ...]) -> int:
    """Largest difference of neighbours in a prefix sum."""
    return max(end - first for first, end in itertools.pairwise(prefix))


def least_rank_units(instance: Instance) -> int:
    """Memory that the fullest rank cannot go below under any split.

    It is at least the mean over ranks, and at least what the largest layer takes alone.
    """
    ranks, stages = instance.choice.num_pipeline_ranks, instance.choice.num_stages
    pairs = zip(instance.entry_kept[1:-1], instance.exit_unkept[1:-1], strict=True)
    cheapest_cut = min((entry - unkept for entry, unkept in pairs), default=0)
    total = sum(instance.fixed_units) + instance.kept[-1] + (stages - 1) * cheapest_cut
    # A rank's largest stage is at least its mean stage.
    per_rank = instance.choice.stages_per_rank
    total += max(_largest_layer(instance.buffer), -(-instance.buffer[-1] // per_rank))
    total += max(0, instance.rebuilt[-1] // per_rank - ranks * max(instance.rebuilt_exit_unkept))
    alone = max(
        instance.kept[end]
        - instance.kept[first]
        - instance.exit_unkept[end]
        + instance.buffer[end]
        - instance.buffer[first]
        + instance.rebuilt[end]
        - instance.rebuilt[first]
        - instance.rebuilt_exit_unkept[end]
        for first, end in itertools.pairwise(range(instance.num_layers + 1))
    )
    return max(-(-total // ranks), alone + min(instance.fixed_units))
