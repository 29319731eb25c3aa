"""Gradient accumulation: which buffer each backward adds into, and when it is reduced.

With replicas that divide gradients, a small pool of buffers serves all units. A unit whose
buffer is wanted by another before its last micro-batch is reduced right after its last use, and
what comes later is added to that: in the layered order one reduction a unit, in plain accumulation
one a unit and micro-batch. Otherwise a sum is never given up before it is complete, and the pool is
as large as that takes. Where sums go to an update on the host, they take turns in two buffers, so
that the copy of one is beside the next one's backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.lower.pools import Holding, Pools
from planner.lower.slots import BufferNames, Slots, unit_instruction
from planner.lower.work import RankWork
from planner.partitions import divides_gradients
from planner.plan.types import Opcode, PlanOptions
from planner.solve.types import Placement

__all__ = ["Operands", "accumulate", "gradient_pools", "place_reductions", "sources"]

_ADDING = (Opcode.BACKWARD, Opcode.BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Gradient buffers that a compute step reads and writes."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def gradient_pools(work: RankWork, placement: Placement, options: PlanOptions) -> Pools:
    """The empty pools of one rank."""
    if placement.num_replicas > 1 and divides_gradients(placement.partition):
        return Pools("sum", placement.num_gradient_buffers)
    if placement.num_replicas > 1:
        # Partial sums would cost a whole reduction each, and save no memory: `reduced` is as large.
        size, is_kept = placement.num_gradient_buffers, False
    else:
        # The update empties a buffer at once, unless it waits for the end of the step.
        size, is_kept = 1 + options.update_on_host, options.updates_wait
    return Pools("sum", size, lambda held, step: is_kept or work.last_uses[held.unit.name] >= step)


def accumulate(work: RankWork, pools: Pools, names: BufferNames) -> dict[int, Operands]:
    """Per backward step, the buffers that it adds the gradients of its stage's units into.

    The first to write a buffer only writes: it starts from zero. An exact unit's later stages leave
    their gradient of each micro-batch in a `part` buffer, and its first stage, which runs backward
    last, adds that part to its own before it adds both to the sum.
    """
    found = {}
    for index, step in enumerate(work.steps):
        if step.opcode not in _ADDING:
            continue
        reads: list[str] = []
        writes: list[str] = []
        for unit in work.units_of[step.stage]:
            if not unit.trainable:
                continue
            if unit.exact:
                part = names[f"part:{unit.name}"][step.micro_batch]
                if step.stage != unit.stages[-1]:
                    reads.append(part)
                if step.stage != unit.stages[0]:
                    writes.append(part)
                    continue
            held = pools.use(unit, index)
            if held.first != index:
                reads.append(held.buffer)
            writes.append(held.buffer)
        found[index] = Operands(reads=tuple(reads), writes=tuple(writes))
    return found


def sources(work: RankWork, pools: Pools, placement: Placement) -> dict[str, str]:
    """Trainable unit -> the buffer in which its whole gradient is found in the end."""
    sums = {holding.unit.name: holding.buffer for holding in pools.holdings}
    return {
        unit.name: (
            f"reduced:{unit.name}"
            if placement.num_replicas > 1 or len(unit.ranks) > 1
            else sums[unit.name]
        )
        for unit in work.units
        if unit.trainable
    }


def place_reductions(slots: Slots, holdings: Sequence[Holding], placement: Placement) -> None:
    """REDUCE behind the last use of each holding, and REDUCE_TIED at the end of the step.

    Every rank enters the collectives of tied units in the order of the units' names.
    """
    reduced: set[str] = set()
    tied = {}
    for holding in holdings:
        name, target = holding.unit.name, f"reduced:{holding.unit.name}"
        source: tuple[str, ...] = (holding.buffer,)
        if placement.num_replicas > 1:
            reads = (*source, target) if name in reduced else source
            slots.behind(holding.last, unit_instruction(Opcode.REDUCE, name, reads, (target,)))
            reduced.add(name)
            source = (target,)
        if len(holding.unit.ranks) > 1:
            tied[name] = unit_instruction(Opcode.REDUCE_TIED, name, source, (target,))
    for name in sorted(tied):
        slots.behind(slots.num_steps, tied[name])
