"""Memory of every rank over the time of a simulated step, allocated and reserved.

Buffers come and go with the issue and the end of instructions (`planner.simulate.memory`), here at
the moments of one timeline; so no moment holds more than the bound over all interleavings. What is
given back at a moment is free for what is taken at that moment, and what is held for no time at all
is left out. Each buffer is one request to the allocator, and so is the transient of an instruction;
what is there through the whole step comes first. This module does not know how a timeline is made.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cluster.types import Allocator, Cluster
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Plan
from planner.simulate.allocator import CachingAllocator
from planner.simulate.durations import Durations
from planner.simulate.issue import IssueClock
from planner.simulate.memory import buffer_lives, class_of, resident_memory, transient_bytes
from planner.simulate.types import MemoryByClass, MemoryOverTime
from planner.timeline import Timeline

__all__ = ["memory_over_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spans:
    """Memory that is held for a while, one entry each."""

    classes: list[str]
    begins: list[float]
    ends: list[float]
    num_bytes: list[int]


def memory_over_time(
    plan: Plan,
    timeline: Timeline,
    cluster: Cluster | None = None,
    *,
    order: PartialOrder | None = None,
) -> tuple[MemoryOverTime, ...]:
    """Per pipeline rank.

    Args:
        timeline: of the plan's own programs, every instruction of every rank.
        cluster: on which it was simulated; the plan's own where absent.
        order: the plan's partial order, where the caller has it already.
    """
    order, cluster = order or partial_order(plan), cluster or plan.cluster
    ends = [0.0] * len(order.members)
    events = iter(timeline.events)
    starts: list[list[float]] = []
    for tasks in order.task_of:
        mine = [next(events) for _ in tasks]
        starts.append([event.start_seconds for event in mine])
        for task, event in zip(tasks, mine, strict=True):
            ends[task] = event.end_seconds
    durations = Durations(plan=plan, cluster=cluster)
    found = []
    for rank, tasks in enumerate(order.task_of):
        clock = IssueClock(
            held_by=order.held_by[rank], overhead_seconds=durations.issue_seconds(rank)
        )
        issued = [clock.moment(index, ends) for index in range(len(tasks))]
        spans = _spans(plan, rank, issued, starts[rank], [ends[task] for task in tasks])
        allocator = cluster.device(plan.world_rank(rank, 0)).allocator
        found.append(_over_time(resident_memory(plan, rank), spans, allocator))
    return tuple(found)


def _spans(
    plan: Plan,
    rank: int,
    issued: Sequence[float],
    starts: Sequence[float],
    ends: Sequence[float],
) -> _Spans:
    """What comes and goes; arguments are per instruction of the rank."""
    # Lives end with the last of their uses to end: the place in the order of ends tells which.
    by_end = sorted(range(len(ends)), key=lambda index: ends[index])
    places = [0] * len(ends)
    for place, index in enumerate(by_end, 1):
        places[index] = place
    lives = buffer_lives(plan, rank, places)
    spans = _Spans(
        classes=[class_of(name) for name in lives.names],
        begins=[issued[index] for index in lives.begins],
        ends=[ends[by_end[place - 1]] for place in lives.ends],
        num_bytes=list(lives.num_bytes),
    )
    made: dict[int, int] = {}
    for name, index, num_bytes in zip(lives.names, lives.begins, lives.num_bytes, strict=True):
        # What a stage makes for others is part of its transient peak; what it saves is not.
        made[index] = made.get(index, 0) + (0 if name.startswith("saved:") else num_bytes)
    for index, taken in enumerate(transient_bytes(plan, rank)):
        transient = taken - made.get(index, 0)
        if transient > 0:
            spans.classes.append("transient")
            spans.begins.append(starts[index])
            spans.ends.append(ends[index])
            spans.num_bytes.append(transient)
    return spans


def _over_time(
    resident: MemoryByClass, spans: _Spans, allocator: Allocator | None
) -> MemoryOverTime:
    begins, ends = np.array(spans.begins), np.array(spans.ends)
    kept = np.flatnonzero(ends > begins)
    begins, ends = begins[kept], ends[kept]
    num_bytes = np.array(spans.num_bytes, dtype=np.int64)[kept]
    seconds = np.unique(np.concatenate(([0.0], begins, ends)))
    first, last = np.searchsorted(seconds, begins), np.searchsorted(seconds, ends)
    classes = np.array(spans.classes, dtype=object)[kept]
    by_class: dict[str, NDArray[np.int64]] = {}
    for name, always in asdict(resident).items():
        mine = classes == name
        change = np.zeros(len(seconds), dtype=np.int64)
        np.add.at(change, first[mine], num_bytes[mine])
        np.subtract.at(change, last[mine], num_bytes[mine])
        by_class[name] = always + np.cumsum(change)
    total = sum(by_class.values(), start=np.zeros(len(seconds), dtype=np.int64))
    peak = int(np.argmax(total))
    reserved = int(total[peak])
    if allocator is not None:
        reserved = _reserved_bytes(resident, begins, ends, num_bytes, allocator)
    return MemoryOverTime(
        seconds=tuple(seconds.tolist()),
        by_class={name: tuple(values.tolist()) for name, values in by_class.items()},
        peak_seconds=float(seconds[peak]),
        peak=MemoryByClass(**{name: int(values[peak]) for name, values in by_class.items()}),
        reserved_bytes=reserved,
    )


def _reserved_bytes(
    resident: MemoryByClass,
    begins: NDArray[np.float64],
    ends: NDArray[np.float64],
    num_bytes: NDArray[np.int64],
    sizes: Allocator,
) -> int:
    """Peak of the segments: each span takes a block and gives it back, in the order of time."""
    allocator = CachingAllocator(sizes=sizes)
    for always in asdict(resident).values():
        allocator.take(always)
    # At one moment, what ends comes before what begins; then in the order of the program.
    moments = [(seconds, True, span) for span, seconds in enumerate(begins.tolist())]
    moments += [(seconds, False, span) for span, seconds in enumerate(ends.tolist())]
    blocks = {}
    for _, takes, span in sorted(moments):
        if takes:
            blocks[span] = allocator.take(int(num_bytes[span]))
        else:
            allocator.give_back(blocks.pop(span))
    return allocator.reserved_bytes
