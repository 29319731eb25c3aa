"""An order of few micro-batches, made longer: warm-up, steady part again and again, drain.

Large problems are solved with as few micro-batches as show how the pipeline fills, runs and drains;
the part in the middle repeats. This module knows how urgent each operation of the whole problem is
by such a pattern. List scheduling turns that into an order, so the result fits in memory and comes
to its end, whatever the pattern was.
"""

import dataclasses
from collections.abc import Iterator

from planner.order.lists import list_order
from planner.order.operations import Operations, Sequences
from planner.order.paths import Times, peak_units, times_of

__all__ = ["extended", "shortened"]


def shortened(operations: Operations, most_operations: int) -> Operations | None:
    """The same problem with fewer micro-batches; None where even those are too many operations.

    Three periods of as many micro-batches as ranks: one to fill, one to repeat, one to drain.
    """
    period, count = operations.num_ranks, operations.num_micro_batches
    fewest = 3 * period + (count - 3 * period) % period
    if fewest >= count or 2 * operations.num_stages * fewest > most_operations:
        return None
    return dataclasses.replace(operations, num_micro_batches=fewest)


def extended(operations: Operations, few: Operations, times: Times) -> Times | None:
    """An order of `operations` after the pattern of `times`, an order of `few`; None without one.

    The best of the patterns themselves, where they fit in memory, and of list schedules by them.
    """
    best: Times | None = None
    for period in _periods(operations, few):
        moments = _moments(operations, few, times, period)
        for sequences in _orders(operations, moments):
            found = times_of(operations, sequences)
            if found is not None and (best is None or found.makespan < best.makespan):
                best = found
    return best


def _orders(operations: Operations, moments: list[int]) -> Iterator[Sequences]:
    ranks: list[list[int]] = [[] for _ in range(operations.num_ranks)]
    for operation in sorted(range(operations.num_operations), key=moments.__getitem__):
        ranks[operations.ranks[operation]].append(operation)
    pattern = tuple(map(tuple, ranks))
    peaks = peak_units(operations, pattern)
    if all(peak <= most for peak, most in zip(peaks, operations.capacity, strict=True)):
        yield pattern

    def urgency(is_backward: bool, stage: int, micro_batch: int) -> tuple[float, ...]:
        of = operations.backward_of if is_backward else operations.forward_of
        return (moments[of(stage, micro_batch)],)

    listed = list_order(operations, urgency)
    if listed is not None:
        yield listed


def _periods(operations: Operations, few: Operations) -> list[int]:
    """Numbers of micro-batches that may repeat."""
    more = operations.num_micro_batches - few.num_micro_batches
    return [p for p in dict.fromkeys((operations.num_ranks, 2, 1)) if more % p == 0]


def _moments(operations: Operations, few: Operations, times: Times, period: int) -> list[int]:
    """When each operation would start if the middle of the pattern went on and on."""
    count, pattern = operations.num_micro_batches, few.num_micro_batches
    filling = (pattern - period) // 2
    work = [0] * operations.num_ranks
    for stage, rank in enumerate(operations.stage_ranks):
        work[rank] += operations.forward[stage] + operations.turn(stage)
    pace, num_more = period * max(work), (count - pattern) // period
    moments = []
    for operation in range(operations.num_operations):
        is_backward, stage, micro_batch = operations.place(operation)
        of = few.backward_of if is_backward else few.forward_of
        repeats = min(num_more, max(0, micro_batch - filling) // period)
        like = of(stage, micro_batch - repeats * period)
        moments.append(times.starts[like] + repeats * pace)
    return moments
