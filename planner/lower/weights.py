"""GATHER and RELEASE: which buffer holds which unit's weights, and when the traffic starts.

Weights that do not stay in place are gathered into a small pool of buffers. A buffer is taken by
the next unit as soon as its last reader is done, least recently used first; a unit that is still
in a buffer when backward begins is not gathered again. In the layered order a rank with V units
and B buffers gathers 2 V - B times a step, whatever the number of micro-batches (arXiv 2106.02679;
Fast-LLM's rule). Where the state lives in host memory, a unit's shard is fetched one gather ahead.
"""

from collections.abc import Sequence

from planner.lower.pools import Holding, Pools
from planner.lower.slots import Slots, unit_instruction
from planner.lower.work import RankWork
from planner.plan.types import Instruction, Opcode

__all__ = ["hold_weights", "place_fetched_gathers", "place_gathers", "weights_in_place"]


def weights_in_place(work: RankWork) -> list[tuple[str, ...]]:
    """Per step, the buffers of its stage's units, which are never moved."""
    names = {
        stage: tuple([f"weights:{unit.name}" for unit in work.units_of[stage]])
        for stage in {step.stage for step in work.steps}
    }
    return [names[step.stage] for step in work.steps]


def hold_weights(work: RankWork, pools: Pools) -> list[tuple[str, ...]]:
    """Per step, the pool buffers that its stage's units are in."""
    return [
        tuple([pools.use(unit, index).buffer for unit in work.units_of[step.stage]])
        for index, step in enumerate(work.steps)
    ]


def place_gathers(slots: Slots, holdings: Sequence[Holding]) -> None:
    """GATHER at the start of each holding, as soon as its buffer is free."""
    _place_releases(slots, holdings)
    for holding in holdings:
        slots.behind(holding.free_from, _gather(holding))


def place_fetched_gathers(slots: Slots, holdings: Sequence[Holding], num_ahead: int) -> None:
    """The same for a state in host memory, with the FETCH of each shard.

    A shard is fetched when the GATHER before is issued, but at most `num_ahead` steps ahead of its
    own. A GATHER holds up the rank until its shard is there, so those that could all start at once
    start one by one: each after the first step that uses the one before.
    """
    _place_releases(slots, holdings)
    pools: dict[str, list[Holding]] = {}
    for holding in holdings:
        pools.setdefault(holding.buffer.rpartition(".")[0], []).append(holding)
    for sequence in pools.values():
        before = -1
        for index, holding in enumerate(sequence):
            step = holding.free_from
            if index and step < 0:
                step = sequence[index - 1].first
            slots.behind(min(step, max(before, step - num_ahead)), _fetch(holding))
            slots.behind(step, _gather(holding))
            before = step


def _place_releases(slots: Slots, holdings: Sequence[Holding]) -> None:
    for holding in holdings:
        name, buffer = holding.unit.name, (holding.buffer,)
        slots.behind(holding.last, unit_instruction(Opcode.RELEASE, name, buffer, buffer))


def _fetch(holding: Holding) -> Instruction:
    shard = f"shard:{holding.unit.name}"
    return unit_instruction(Opcode.FETCH, holding.unit.name, (f"host:{shard}",), (shard,))


def _gather(holding: Holding) -> Instruction:
    name = holding.unit.name
    return unit_instruction(Opcode.GATHER, name, (f"shard:{name}",), (holding.buffer,))
