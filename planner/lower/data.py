"""Gather, reduce and update: which buffer holds which unit, and when the traffic starts.

Weights of a partitioned state are gathered into a small pool of buffers. A buffer is taken by the
next unit as soon as its last reader is done, least recently used first; a unit that is still in a
buffer when backward begins is not gathered again. With V units and B buffers a step gathers
2 V - B times, whatever the number of micro-batches (arXiv 2106.02679; Fast-LLM's rule).
Gradients are reduced right after their stage's last backward; the update that follows is issued
one stage later, so that the reduction hides behind that stage's work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from planner.lower.units import pool_name
from planner.plan.types import Instruction, Opcode, Unit
from planner.schedule import ComputeStep
from planner.solve.types import Placement

__all__ = [
    "Placed",
    "Span",
    "gather_instructions",
    "gradient_buffers",
    "spans_of",
    "update_instructions",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An instruction and the compute step it is issued before (or after)."""

    step: int
    """Index of the compute step; the number of steps for the end of the program."""
    after: bool
    """Issued after the step rather than before it."""
    instruction: Instruction


@dataclass(slots=True, kw_only=True)
class Span:
    """Consecutive compute steps that use one unit."""

    unit: Unit
    first: int
    last: int
    buffer: str = ""
    gathered: bool = field(default=False)
    """Whether a GATHER precedes it (False: the unit is still in its buffer)."""
    free_from: int = -1
    """Step after which the buffer was free for it."""


def spans_of(steps: Sequence[ComputeStep], units: Iterable[Unit]) -> list[Span]:
    """Uses of each unit by the rank's compute steps, consecutive steps of one stage merged."""
    spans: list[Span] = []
    for unit in units:
        current: Span | None = None
        previous: ComputeStep | None = None
        for index, step in enumerate(steps):
            if step.stage not in unit.stages:
                previous = None
                continue
            if current and previous and _same_phase(previous, step):
                current.last = index
            else:
                current = Span(unit=unit, first=index, last=index)
                spans.append(current)
            previous = step
    return sorted(spans, key=lambda span: (span.first, span.unit.name))


def _same_phase(one: ComputeStep, other: ComputeStep) -> bool:
    forward = Opcode.FORWARD
    return one.stage == other.stage and (one.opcode is forward) == (other.opcode is forward)


def _assign_gather_buffers(spans: list[Span], num_buffers: int) -> None:
    """Give each span a buffer of its unit's pool, least recently used first."""
    held: dict[str, dict[str, tuple[str, int]]] = {}
    for span in spans:
        pool = pool_name(span.unit)
        size = num_buffers if len(span.unit.stages) == 1 else 1
        buffers = held.setdefault(
            pool, {f"weights:{pool}.{i}": ("", i - size - 1) for i in range(size)}
        )
        mine = [name for name, (unit, _) in buffers.items() if unit == span.unit.name]
        span.buffer = mine[0] if mine else min(buffers, key=lambda name: buffers[name][1])
        span.gathered = not mine
        span.free_from = max(buffers[span.buffer][1], -1)
        buffers[span.buffer] = (span.unit.name, span.last)


def gather_instructions(spans: list[Span], num_buffers: int) -> list[Placed]:
    """GATHER and RELEASE of a rank with a partitioned state."""
    _assign_gather_buffers(spans, num_buffers)
    placed = []
    last_use = {(span.buffer, span.unit.name): span for span in spans}
    for index, span in enumerate(spans):
        if span.gathered:
            gather = Instruction(
                opcode=Opcode.GATHER,
                stream="data",
                unit=span.unit.name,
                reads=(f"shard:{span.unit.name}",),
                writes=(span.buffer,),
            )
            placed.append(Placed(step=span.free_from, after=True, instruction=gather))
        follower = next((s for s in spans[index + 1 :] if s.buffer == span.buffer), None)
        evicted = follower is not None and follower.unit is not span.unit
        if evicted or last_use[span.buffer, span.unit.name] is span:
            release = Instruction(
                opcode=Opcode.RELEASE, stream="data", unit=span.unit.name, reads=(span.buffer,)
            )
            placed.append(Placed(step=span.last, after=True, instruction=release))
    # A buffer is released before it is taken again, and gathers keep the order of their uses.
    order = {id(item): position for position, item in enumerate(placed)}
    return sorted(
        placed,
        key=lambda p: (p.step, p.instruction.opcode is Opcode.GATHER, order[id(p)]),
    )


def gradient_buffers(
    steps: Sequence[ComputeStep], units: Iterable[Unit], placement: Placement
) -> dict[str, str]:
    """Accumulation buffer of each trainable unit: a pool used round-robin in backward order.

    One replica needs one buffer: the update empties it before the next stage's backward.
    """
    size = 1 if placement.num_replicas == 1 else placement.num_gradient_buffers
    stages = list(dict.fromkeys(s.stage for s in steps if s.opcode is Opcode.BACKWARD))
    taken: dict[str, int] = {}
    found = {}
    for stage in stages:
        for unit in units:
            if not unit.trainable or stage not in unit.stages or unit.name in found:
                continue
            pool = pool_name(unit)
            index = taken.get(pool, 0)
            taken[pool] = index + 1
            found[unit.name] = f"sum:{pool}.{index % size}"
    return found


def update_instructions(
    steps: Sequence[ComputeStep],
    units: Sequence[Unit],
    sums: dict[str, str],
    placement: Placement,
) -> list[Placed]:
    """REDUCE, REDUCE_TIED and UPDATE of a rank."""
    stage_ends = {s.stage: i for i, s in enumerate(steps) if s.opcode is Opcode.BACKWARD}
    ends = sorted(stage_ends.values())
    last_backward = {
        unit.name: max(stage_ends[stage] for stage in unit.stages if stage in stage_ends)
        for unit in units
        if unit.trainable
    }
    placed = []
    for unit in sorted((u for u in units if u.trainable), key=lambda u: last_backward[u.name]):
        done = last_backward[unit.name]
        source = sums[unit.name]
        if placement.num_replicas > 1:
            reduced = f"reduced:{unit.name}"
            placed.append(_placed(Opcode.REDUCE, unit, done, (source,), (reduced,)))
            source = reduced
        at = done
        if placement.num_replicas > 1:
            at = next((end for end in ends if end > done), len(steps))
        if len(unit.ranks) > 1:
            at = len(steps)
            reduced = f"reduced:{unit.name}"
            reads = tuple(dict.fromkeys((source,)))
            placed.append(_placed(Opcode.REDUCE_TIED, unit, at, reads, (reduced,)))
            source = reduced
        placed.append(_update(unit, at, source, placement))
    order = (Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.UPDATE)
    return sorted(
        placed,
        key=lambda p: (p.step, order.index(p.instruction.opcode), p.instruction.unit or ""),
    )


def _placed(
    opcode: Opcode, unit: Unit, step: int, reads: tuple[str, ...], writes: tuple[str, ...]
) -> Placed:
    instruction = Instruction(
        opcode=opcode, stream="data", unit=unit.name, reads=reads, writes=writes
    )
    return Placed(step=step, after=True, instruction=instruction)


def _update(unit: Unit, step: int, source: str, placement: Placement) -> Placed:
    shard = f"shard:{unit.name}"
    weights = () if placement.partition else (f"weights:{unit.name}",)
    instruction = Instruction(
        opcode=Opcode.UPDATE,
        stream="compute",
        unit=unit.name,
        reads=(source, shard, *weights),
        writes=(shard, *weights),
    )
    return Placed(step=step, after=True, instruction=instruction)
