"""Longest paths: when operations can start, what follows them, and the moments of a given order.

This module knows precedences and one-machine bounds. It does not know how an order is found.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.order.operations import Operations, Sequences

__all__ = [
    "Times", "heads_and_tails", "least_makespan", "peak_units", "times_of", "topological",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When each operation of an order starts, none earlier than it must wait for."""

    sequences: Sequences
    starts: tuple[int, ...]
    """By operation."""
    makespan: int


def times_of(operations: Operations, sequences: Sequences) -> Times | None:
    """The moments of an order; None where ranks come to wait for each other."""
    followers = _followers(operations)
    waiting = [len(found) for found in operations.predecessors]
    starts = [0] * operations.num_operations
    for sequence in sequences:
        for index, operation in enumerate(sequence):
            waiting[operation] += index > 0
    following = {
        before: after for sequence in sequences for before, after in itertools.pairwise(sequence)
    }
    ready = [operation for operation, number in enumerate(waiting) if number == 0]
    num_done = 0
    while ready:
        operation = ready.pop()
        num_done += 1
        after = following.get(operation)
        edges = followers[operation]
        if after is not None:
            edges = [*edges, (after, operations.durations[operation])]
        for later, ticks in edges:
            starts[later] = max(starts[later], starts[operation] + ticks)
            waiting[later] -= 1
            if waiting[later] == 0:
                ready.append(later)
    if num_done < operations.num_operations:
        return None
    return Times(
        sequences=sequences,
        starts=tuple(starts),
        makespan=max(map(sum, zip(starts, operations.durations, strict=True))),
    )


def peak_units(operations: Operations, sequences: Sequences) -> list[int]:
    """The most that each rank holds in an order."""
    peaks = []
    for sequence in sequences:
        held = peak = 0
        for operation in sequence:
            is_backward, stage, _ = operations.place(operation)
            if is_backward:
                peak = max(peak, held + operations.backward_extra[stage])
                held -= operations.held[stage]
            else:
                held += operations.held[stage]
                peak = max(peak, held + operations.forward_extra[stage])
        peaks.append(peak)
    return peaks


def heads_and_tails(operations: Operations) -> tuple[list[int], list[int]]:
    """By operation: its earliest start, and the ticks from its end to the end of the step at least.

    From precedences alone: ranks may do several things at once here.
    """
    order = topological(operations)
    heads, tails = [0] * operations.num_operations, [0] * operations.num_operations
    for operation in order:
        for earlier, ticks in operations.predecessors[operation]:
            heads[operation] = max(heads[operation], heads[earlier] + ticks)
    for operation in reversed(order):
        after = operations.durations[operation] + tails[operation]
        for earlier, ticks in operations.predecessors[operation]:
            left = ticks + after - operations.durations[earlier]
            tails[earlier] = max(tails[earlier], left)
    return heads, tails


def least_makespan(operations: Operations) -> int:
    """No order takes fewer ticks.

    Each rank alone is a machine whose jobs have heads and tails; preemption only helps it (Jackson;
    Carlier 1982). And what its jobs hold, for as long as they must, has to pass through its memory.
    """
    heads, tails = heads_and_tails(operations)
    best = 0
    for rank in range(operations.num_ranks):
        own = [op for op in range(operations.num_operations) if operations.ranks[op] == rank]
        jobs = [(heads[op], operations.durations[op], tails[op]) for op in own]
        best = max(best, _preemptive(jobs), _memory_bound(operations, rank, heads, tails))
    return best


def _memory_bound(
    operations: Operations, rank: int, heads: Sequence[int], tails: Sequence[int]
) -> int:
    """Units times ticks that the rank's memory must serve, over its capacity."""
    stages, area = operations.stages_of(rank), 0
    for stage in stages:
        area += operations.held[stage] * _least_life(operations, stage)
    area *= operations.num_micro_batches
    if not area or not operations.capacity[rank]:
        return 0
    head = min(heads[operations.forward_of(stage, 0)] for stage in stages)
    last = operations.num_micro_batches - 1
    tail = min(tails[operations.backward_of(stage, last)] for stage in stages)
    return head + -(-area // operations.capacity[rank]) + tail


def _least_life(operations: Operations, stage: int) -> int:
    """Ticks from the start of a micro-batch's forward to the end of its backward at least."""
    moments = {operations.forward_of(stage, 0): 0}
    back = operations.backward_of(stage, 0)
    num_stages = operations.num_stages
    chain = [operations.forward_of(later, 0) for later in range(stage + 1, num_stages)]
    chain += [operations.backward_of(later, 0) for later in range(num_stages - 1, stage - 1, -1)]
    for operation in chain:
        reached = [
            moments[earlier] + ticks
            for earlier, ticks in operations.predecessors[operation]
            if earlier in moments
        ]
        if reached:
            moments[operation] = max(reached)
    return moments[back] + operations.turn(stage)


def _preemptive(jobs: Iterable[tuple[int, int, int]]) -> int:
    """The makespan of jobs (head, ticks, tail) on one machine that may interrupt them."""
    waiting = sorted(jobs)
    heap: list[list[int]] = []
    now = best = index = 0
    while heap or index < len(waiting):
        if not heap:
            now = max(now, waiting[index][0])
        while index < len(waiting) and waiting[index][0] <= now:
            _, ticks, tail = waiting[index]
            heapq.heappush(heap, [-tail, ticks])
            index += 1
        tail, ticks = heap[0]
        until = waiting[index][0] if index < len(waiting) else now + ticks
        worked = min(ticks, until - now)
        now += worked
        if worked == ticks:
            heapq.heappop(heap)
            best = max(best, now - tail)
        else:
            heap[0][1] -= worked
    return best


def _followers(operations: Operations) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[] for _ in range(operations.num_operations)]
    for operation, predecessors in enumerate(operations.predecessors):
        for earlier, ticks in predecessors:
            found[earlier].append((operation, ticks))
    return found


def topological(operations: Operations) -> list[int]:
    """All operations, each behind those that it waits for."""
    followers = _followers(operations)
    waiting = [len(found) for found in operations.predecessors]
    ready = [operation for operation, number in enumerate(waiting) if number == 0]
    for operation in ready:
        for later, _ in followers[operation]:
            waiting[later] -= 1
            if waiting[later] == 0:
                ready.append(later)
    return ready
