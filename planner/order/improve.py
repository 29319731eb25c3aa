"""A good order to start from, and a better one from CP-SAT: of all operations, or of a pattern.

This module knows which of the others to ask for a problem's size.
"""

import time
from collections.abc import Iterable

from planner.order.extend import extended, shortened
from planner.order.lists import POLICIES, list_order, policy
from planner.order.model import Solved, solve_order
from planner.order.operations import Operations, Sequences
from planner.order.paths import Times, least_makespan, peak_units, times_of

__all__ = ["MAX_LISTED", "best_start", "fits", "improved"]

MAX_WHOLE = 1200
"""Operations up to which CP-SAT gets all of them; beyond that a few micro-batches."""
MAX_LISTED = 12_000
"""Operations up to which lists are made."""


def best_start(operations: Operations, known: Iterable[Sequences] = ()) -> Times | None:
    """The shortest of the orders that are known and of list schedules, if any fits in memory."""
    best: Times | None = None
    for sequences in known:
        if fits(operations, sequences):
            best = _better(best, times_of(operations, sequences))
    if operations.num_operations > MAX_LISTED:
        return best
    least = least_makespan(operations)
    for name in POLICIES:
        if best is not None and best.makespan <= least:
            break
        listed = list_order(operations, policy(name, operations))
        if listed is not None:
            best = _better(best, times_of(operations, listed))
    return best


def improved(
    operations: Operations,
    start: Times,
    *,
    time_limit_seconds: float,
    seed: int,
) -> Solved:
    """CP-SAT's order: first of a few micro-batches, made longer, then of all if they are not too
    many."""
    began = time.monotonic()
    bound = least_makespan(operations)
    few = shortened(operations, MAX_WHOLE)
    few_start = None if few is None else best_start(few)
    if few is not None and few_start is not None and start.makespan > bound:
        seconds = time_limit_seconds / 2
        pattern = solve_order(few, few_start, time_limit_seconds=seconds, seed=seed)
        start = _better(extended(operations, few, pattern.times), start) or start
    if operations.num_operations > MAX_WHOLE:
        return Solved(times=start, bound=min(bound, start.makespan))
    return solve_order(
        operations,
        start,
        time_limit_seconds=time_limit_seconds - (time.monotonic() - began),
        seed=seed,
    )


def fits(operations: Operations, sequences: Sequences) -> bool:
    """Whether an order stays within every rank's capacity."""
    peaks = peak_units(operations, sequences)
    return all(peak <= most for peak, most in zip(peaks, operations.capacity, strict=True))


def _better(one: Times | None, other: Times | None) -> Times | None:
    if one is None or other is None:
        return one or other
    return other if other.makespan < one.makespan else one
