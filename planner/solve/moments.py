"""When a pipeline rank holds the most: its peak memory as the largest of a few moments.

In the layered order memory grows through forward and changes hands through backward, stage by
stage. So a rank's peak is at the end of a stage's forward, at the beginning of its backward, or at
its end, when its gradients are summed. Every moment is a sum of tables over the rank's stages:
state and pools that stay, what the stages so far have stored, and what the stage and its neighbours
hold then. So it is linear in the cuts, and one text serves numbers, arrays and CP-SAT.
This module knows the moments. It does not know what is in the tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from planner.solve.tables import Table

__all__ = ["MemoryTables", "Moment", "Near", "peaks"]

Units = Any
"""A number of units, an array of them, or a linear expression whose value is one."""
Pair = tuple[Table, Table]
"""Without recompute, and with."""
Read = Callable[[Table, int], Units]
Either = Callable[[Pair, int], Units]


class Near(NamedTuple):
    """What a neighbour of a stage holds at one of its moments."""

    distance: int
    """Among the rank's stages, ascending."""
    table: Table
    behind: int = 0
    """Only of a neighbour with so many of the rank's stages behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a rank holds at one moment of one of its stages, beside what it always does."""

    stored: Literal["with own", "before", "nothing"]
    """Stored activations: of the stage and the rank's earlier ones, of earlier ones, or of none."""
    own: Pair
    near: tuple[Near, ...]
    """What stages around it hold."""
    waiting: int | None
    """Distance of the first stage whose reduced gradients are there and wait for the end; None if
    nothing waits yet."""
    only: Literal["", "first", "last"] = ""
    """Of the rank's first or last stage alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTables:
    """Units of memory."""

    state: Table
    """There through the whole step."""
    gather: Table
    """A weight buffer; the largest stage of a rank counts."""
    num_gather_buffers: int
    sums: Table
    """A gradient buffer; likewise."""
    num_sum_buffers: int
    alternates: bool
    """Each gradient buffer is as large as its own stages need, which take turns; else all are as
    large as the largest stage needs."""
    stored: Pair
    """Of all micro-batches, from forward to backward."""
    waiting: Table
    """Reduced gradients until the end of the step; nothing unless updates wait."""
    moments: tuple[Moment, ...]


def peaks(
    memory: MemoryTables,
    ranks: Sequence[Sequence[int]],
    read: Read,
    either: Either,
    largest: Callable[..., Units],
) -> list[Units]:
    """Of each rank, whose stages are listed ascending."""
    return [
        _always(memory, own, read, largest) + _most(memory, own, read, either, largest)
        for own in ranks
    ]


def _always(
    memory: MemoryTables, own: Sequence[int], read: Read, largest: Callable[..., Units]
) -> Units:
    found = sum(read(memory.state, stage) for stage in own)
    if memory.num_gather_buffers:
        number = min(memory.num_gather_buffers, len(own))
        found = found + number * _largest(memory.gather, own, read, largest)
    number = min(memory.num_sum_buffers, len(own))
    if not memory.alternates:
        return found + number * _largest(memory.sums, own, read, largest)
    return found + sum(
        _largest(memory.sums, own[::-1][turn::number], read, largest) for turn in range(number)
    )


def _largest(
    table: Table, stages: Sequence[int], read: Read, largest: Callable[..., Units]
) -> Units:
    found = [read(table, stage) for stage in stages]
    return largest(*found) if len(found) > 1 else found[0]


def _most(
    memory: MemoryTables,
    own: Sequence[int],
    read: Read,
    either: Either,
    largest: Callable[..., Units],
) -> Units:
    """At the worst of the moments."""
    waits = not memory.waiting.is_zero
    waiting = [read(memory.waiting, stage) if waits else 0 for stage in own]
    found, before = [], 0
    for position, stage in enumerate(own):
        stored = before + either(memory.stored, stage)
        for moment in memory.moments:
            if (moment.only == "last" and position + 1 < len(own)) or (
                moment.only == "first" and position
            ):
                continue
            held = either(moment.own, stage)
            if moment.stored != "nothing":
                held = held + (stored if moment.stored == "with own" else before)
            for distance, table, behind in moment.near:
                if 0 <= position + distance < len(own) - behind:
                    held = held + read(table, own[position + distance])
            if waits and moment.waiting is not None:
                held = held + sum(waiting[max(0, position + moment.waiting) :])
            found.append(held)
        before = stored
    return largest(*found) if len(found) > 1 else found[0]
