"""What no split of an instance can undercut, in time and in memory.

These bounds cost next to nothing. They leave most choices out of the search before any split of
them is made, so they must hold: for the step-time model, and for the simulator, which follows it.
Where stages may be recomputed or not, and where ranks differ, they take the cheaper.
This module knows the Instance alone.
"""

import itertools

from planner.solve.instance import Instance
from planner.solve.splits import largest_stage
from planner.solve.tables import Table, least

__all__ = ["least_rank_units", "least_step_ticks"]


def least_step_ticks(instance: Instance) -> int:
    """A step time that no split of this instance can undercut (memory left aside).

    Three paths that every split has: one micro-batch through all stages while the others wait
    for the longest; the busiest rank's compute, after the shortest possible fill and before the
    shortest drain, or up to its own last update; the data stream of the rank with most traffic.
    """
    choice, pace = instance.choice, instance.pace
    ranks, stages, count = choice.num_pipeline_ranks, choice.num_stages, choice.num_micro_batches
    forward, backward = _least(instance, "forward"), _least(instance, "backward")
    second = _least(instance, "again")
    there, back = (
        [min(table[1:-1], default=0) for table in tables]
        for tables in (instance.hops, instance.gradient_hops)
    )
    there, back = ([hops[kind] for kind in instance.hop_kinds[1:]] for hops in (there, back))
    fill = sum(sorted(there)[: ranks - 1]) + _smallest_layers(forward, ranks - 1)
    drain = sum(sorted(back)[: ranks - 1]) + _smallest_layers(backward, ranks - 1)
    start = _first_layer(instance, "gather") if pace.gathers else 0
    end = _least_end(instance)

    again = 1 if choice.recompute else 0
    through, returned = _everything(forward, stages), _everything(backward, stages)
    turns = [b - f for f, b in itertools.pairwise(instance.time)]
    largest_turn = max(t - f for t, f in zip(turns, forward.layers, strict=True))
    longest = max(max(forward.layers), -(-through // stages))
    rebuilt = again * _everything(second, stages)
    longest += max(largest_turn, -(-(returned + rebuilt) // stages))
    # In every split some stage is as long as this, both directions together.
    longest = max(longest, largest_stage(instance.time, stages))
    chain = through + returned + (count - 1) * longest + sum(there) + sum(back)

    compute = count * (through + returned) + again * _least_rebuilt(instance, second)
    busiest = fill + -(-compute // ranks) + drain
    largest = count * max(turns) - again * max(second.layers)
    if pace.is_modular:  # elsewhere, the rank with the largest layer may be first and last
        largest += fill + drain
    updates = _everything(_least(instance, "update"), stages)
    floor = stages * min(kind.least_update for kind in instance.kinds)
    computed = 0 if pace.updates_on_host else max(updates, floor)
    return max(
        start + chain + end,
        start + max(busiest, largest) + end,
        fill + -(-(compute + computed) // ranks),
        -(-_least_traffic(instance) // ranks),
    )


def _least(instance: Instance, name: str) -> Table:
    """Below that table of every kind of rank."""
    return least([getattr(kind, name) for kind in instance.kinds])


def _first_layer(instance: Instance, name: str) -> int:
    """At least what the stage takes that holds the first layer."""
    table = _least(instance, name)
    return table.prefix[1] + table.entry[0] + min(table.leave)


def _everything(table: Table, num_stages: int) -> int:
    """At least what so many stages that hold all layers take together."""
    inner = min(table.entry[1:-1], default=0) + min(table.leave[1:-1], default=0)
    return table.prefix[-1] + table.entry[0] + table.leave[-1] + (num_stages - 1) * inner


def _smallest_layers(table: Table, number: int) -> int:
    """So many of the smallest layers."""
    return sum(sorted(table.layers)[:number])


def _least_end(instance: Instance) -> int:
    """After the first stage's backward: its reduction and its update at least."""
    pace = instance.pace
    end = _first_layer(instance, "reduce") if pace.reduces else 0
    end += max(_first_layer(instance, "update"), min(kind.least_update for kind in instance.kinds))
    return end + (_first_layer(instance, "gather_updated") if pace.gathers_updated else 0)


def _least_rebuilt(instance: Instance, second: Table) -> int:
    """Ticks of second forwards that delay the step, where every stage has one.

    While the pipeline drains, the first micro-batch of a rank's last stage is rebuilt unnoticed;
    nothing drains on one rank. All other stages hold a layer each at least.
    """
    choice = instance.choice
    whole = _everything(second, choice.num_stages)
    if choice.num_pipeline_ranks == 1:
        return choice.num_micro_batches * whole
    others = choice.num_stages - choice.num_pipeline_ranks
    return (choice.num_micro_batches - 1) * whole + _smallest_layers(second, others)


def _least_traffic(instance: Instance) -> int:
    """Of all ranks' data streams together."""
    pace, stages = instance.pace, instance.choice.num_stages
    names = {
        "gather": pace.gathers,
        "reduce": pace.reduces,
        "gather_updated": pace.gathers_updated,
    }
    return sum(_everything(_least(instance, name), stages) for name, used in names.items() if used)


def least_rank_units(instance: Instance) -> int:
    """Memory that the fullest rank cannot go below under any split.

    It is at least the mean over ranks at the end of forward, and at least what the largest layer
    takes alone.
    """
    memory, choice = instance.memory, instance.choice
    ranks, per_rank = choice.num_pipeline_ranks, choice.stages_per_rank
    options = memory.stored if choice.recompute is None else (memory.stored[choice.recompute],)
    total = sum(instance.fixed_units) + memory.state.prefix[-1]
    total += min(_everything(table, choice.num_stages) for table in options)
    # A rank's largest stage is at least its mean stage.
    total += memory.num_gather_buffers * max(
        max(memory.gather.layers), memory.gather.prefix[-1] // per_rank
    )
    turns = -(-per_rank // max(1, memory.num_sum_buffers)) if memory.alternates else 1
    number = 1 if memory.alternates else memory.num_sum_buffers
    total += max(
        number * max(memory.sums.layers),
        number * memory.sums.prefix[-1] // (turns if memory.alternates else per_rank),
    )
    alone = max(
        state + memory.num_gather_buffers * gather + number * sums
        for state, gather, sums in zip(
            memory.state.layers, memory.gather.layers, memory.sums.layers, strict=True
        )
    )
    return max(-(-total // ranks), alone + min(instance.fixed_units))
