"""The end of a unit's step: CHECK_FINITE and CLIP, UPDATE, and the state's way back to the host.

An update follows its unit's last backward; with replicas it is issued one stage later, so that the
reduction hides behind that stage's work. Where the whole gradient must be looked at first (finite,
norm), or tied ranks must agree, updates stand at the end of the step. A state that lives in host
memory is fetched one update ahead, when the one before the last has left the device.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.lower.pools import Holding
from planner.lower.slots import LOOKAHEAD, Slots, unit_instruction
from planner.lower.work import RankWork
from planner.plan.types import Instruction, Opcode, PlanOptions
from planner.solve.types import Placement

__all__ = ["place_updates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """An UPDATE, and the compute steps around it."""

    unit: str
    source: str
    step: int
    """It is issued behind this step."""
    shard_from: int | None
    """Step behind which its shard may be fetched again; None where it is still on the device, as
    after a gather for backward."""


def place_updates(
    slots: Slots,
    work: RankWork,
    sources: Mapping[str, str],
    holdings: Sequence[Holding] | None,
    placement: Placement,
    options: PlanOptions,
) -> None:
    """CHECK_FINITE, CLIP and the UPDATEs of one rank, with what copies its state.

    `sources` is the gradient of each trainable unit, `holdings` what gathered its weights, or
    None where weights stay in place.
    """
    gradients = tuple(sources.values())
    verdicts: tuple[str, ...] = ()
    for opcode, name, wanted in (
        (Opcode.CHECK_FINITE, "finite", options.check_finite),
        (Opcode.CLIP, "scale", options.clip_norm is not None),
    ):
        if wanted:
            slots.behind(slots.num_steps, unit_instruction(opcode, None, gradients, (name,)))
            verdicts += (name,)
    updates = _updates(work, sources, holdings or (), placement, at_end=bool(verdicts))
    if placement.offload_state and updates:
        step = updates[0].step - LOOKAHEAD - 1
        _fetch_state(slots, updates[0], max(-1, step))
    for index, update in enumerate(updates):
        if placement.offload_state and index:
            _release_state(slots, updates[index - 1].unit, update.step)
        if placement.offload_state and index + 1 < len(updates):
            _fetch_state(slots, updates[index + 1], update.step)
        slots.behind(update.step, _instruction(update, verdicts, in_place=holdings is None))
        for instruction in _copies(update.unit, placement, options):
            slots.behind(update.step, instruction)
    if placement.offload_state and updates:
        _release_state(slots, updates[-1].unit, slots.num_steps)


def _updates(
    work: RankWork,
    sources: Mapping[str, str],
    holdings: Sequence[Holding],
    placement: Placement,
    *,
    at_end: bool,
) -> list[_Update]:
    """In the order in which they are issued."""
    gathered = {holding.unit.name: holding for holding in holdings}
    found = []
    for unit in work.units:
        if not unit.trainable:
            continue
        step = done = work.last_uses[unit.name]
        if at_end or len(unit.ranks) > 1:
            step = len(work.steps)
        elif placement.num_replicas > 1:
            position = bisect_right(work.stage_ends, done)
            step = [*work.stage_ends, len(work.steps)][position]
        shard_from, held = None, gathered.get(unit.name)
        if held is not None and work.steps[held.first].opcode is Opcode.FORWARD:
            shard_from = held.first
        update = _Update(
            unit=unit.name, source=sources[unit.name], step=step, shard_from=shard_from
        )
        found.append((step, done, unit.name, update))
    return [update for *_, update in sorted(found, key=lambda entry: entry[:3])]


def _fetch_state(slots: Slots, update: _Update, step: int) -> None:
    """FETCH of what the update needs, behind `step` or as soon after it as nothing waits."""
    moments = f"moments:{update.unit}"
    slots.behind(
        step, unit_instruction(Opcode.FETCH, update.unit, (f"host:{moments}",), (moments,))
    )
    if update.shard_from is not None:
        shard = f"shard:{update.unit}"
        fetch = unit_instruction(Opcode.FETCH, update.unit, (f"host:{shard}",), (shard,))
        slots.behind(max(step, update.shard_from), fetch)


def _release_state(slots: Slots, unit: str, step: int) -> None:
    """RELEASE of the updated state: it waits until the host has it."""
    for buffer in ((f"shard:{unit}",), (f"moments:{unit}",)):
        slots.behind(step, unit_instruction(Opcode.RELEASE, unit, buffer, buffer))


def _instruction(update: _Update, verdicts: tuple[str, ...], *, in_place: bool) -> Instruction:
    state: tuple[str, ...] = (f"shard:{update.unit}", f"moments:{update.unit}")
    if in_place:
        state = (*state, f"weights:{update.unit}")
    reads = (update.source, *state, *verdicts)
    return unit_instruction(Opcode.UPDATE, update.unit, reads, state)


def _copies(unit: str, placement: Placement, options: PlanOptions) -> list[Instruction]:
    """What leaves the updated state in host memory."""
    shard, moments = f"shard:{unit}", f"moments:{unit}"
    if placement.offload_state:
        return [
            unit_instruction(Opcode.EVICT, unit, (name,), (f"host:{name}",))
            for name in (shard, moments)
        ]
    if options.save:
        hosts = (f"host:{shard}", f"host:{moments}")
        return [unit_instruction(Opcode.SAVE, unit, (shard, moments), hosts)]
    return []
