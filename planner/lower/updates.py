"""The end of a unit's step: CHECK_FINITE and CLIP, UPDATE, GATHER, and the state's way to the host.

An update follows its unit's last backward; with replicas it is issued one stage later, so that the
reduction hides behind that stage's work. Where the whole gradient must be looked at first (finite,
norm), or tied ranks must agree, updates stand at the end of the step. Where clipping is delayed
they do not wait for the norm: each leaves its part of it for a CLIP at the end. Where each replica
updates its part of weights that stay whole, their GATHER follows at once; such an update is issued
one micro-batch before that next stage's end, so that the GATHER is in the data stream ahead of the
stage's REDUCE, and the step ends with one of each. A state that lives in host memory is fetched one
update ahead, when the one before the last has left the device. Where updates run on the host, the
gradient is evicted where the update would stand, and its UPDATE is issued with the next one's
eviction, so that nothing waits for the copy; it ends beside whatever comes then.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.lower.pools import Holding
from planner.lower.slots import LOOKAHEAD, Slots, unit_instruction
from planner.lower.work import RankWork
from planner.partitions import gathers_updates, offloaded
from planner.plan.names import stream_of
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
    if options.update_on_host:
        updates = _updates(work, sources, (), placement, at_end=False)
        _place_on_host(slots, updates, sources, options)
    else:
        verdicts = _place_verdicts(slots, sources, options)
        updates = _updates(work, sources, holdings or (), placement, at_end=bool(verdicts))
        _place_on_device(slots, updates, verdicts, placement, options, in_place=holdings is None)
    if options.clip_delayed:
        squares = tuple(f"square:{update.unit}" for update in updates)
        clip = unit_instruction(Opcode.CLIP, None, squares, ("clip:scale",))
        slots.behind(slots.num_steps, clip)


def _place_verdicts(
    slots: Slots, sources: Mapping[str, str], options: PlanOptions
) -> tuple[str, ...]:
    """CHECK_FINITE and CLIP at the end of the step, and the buffers that they write."""
    verdicts: tuple[str, ...] = ()
    for opcode, name, wanted in (
        (Opcode.CHECK_FINITE, "finite", options.check_finite),
        (Opcode.CLIP, "scale", options.clip_norm is not None and not options.clip_delayed),
    ):
        if wanted:
            gradients = tuple(sources.values())
            slots.behind(slots.num_steps, unit_instruction(opcode, None, gradients, (name,)))
            verdicts += (name,)
    return verdicts


def _place_on_host(
    slots: Slots,
    updates: Sequence[_Update],
    sources: Mapping[str, str],
    options: PlanOptions,
) -> None:
    """EVICT of each gradient, also ahead of verdicts on all of them, and UPDATE behind the next
    one's or the verdicts."""
    for index, update in enumerate(updates):
        if index and not options.updates_wait:
            slots.behind(update.step, _instruction(updates[index - 1], (), options))
        gradient = (f"host:reduced:{update.unit}",)
        evict = unit_instruction(Opcode.EVICT, update.unit, (update.source,), gradient)
        slots.behind(update.step, evict)
    verdicts = _place_verdicts(slots, sources, options)
    for update in updates if options.updates_wait else updates[-1:]:
        slots.behind(slots.num_steps, _instruction(update, verdicts, options))


def _place_on_device(
    slots: Slots,
    updates: Sequence[_Update],
    verdicts: tuple[str, ...],
    placement: Placement,
    options: PlanOptions,
    *,
    in_place: bool,
) -> None:
    """UPDATE, and what brings its state to the device and away again; `in_place` are weights."""
    away = offloaded(placement.partition, offload_state=placement.offload_state)
    if away and updates:
        step = updates[0].step - LOOKAHEAD - 1
        _fetch_state(slots, updates[0], max(-1, step))
    for index, update in enumerate(updates):
        if away and index:
            _release_state(slots, updates[index - 1].unit, update.step, away)
        if away and index + 1 < len(updates):
            _fetch_state(slots, updates[index + 1], update.step)
        slots.behind(update.step, _instruction(update, verdicts, options, in_place=in_place))
        if gathers_updates(placement.partition):
            slots.behind(update.step, _gather(update.unit))
        for instruction in _copies(update.unit, away, options):
            slots.behind(update.step, instruction)
    if away and updates:
        _release_state(slots, updates[-1].unit, slots.num_steps, away)


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
            if gathers_updates(placement.partition) and step < len(work.steps):
                step = _before_the_last(work, done, step)
        shard_from, held = None, gathered.get(unit.name)
        if held is not None and work.steps[held.first].opcode is Opcode.FORWARD:
            shard_from = held.first
        update = _Update(
            unit=unit.name, source=sources[unit.name], step=step, shard_from=shard_from
        )
        found.append((step, done, unit.name, update))
    return [update for *_, update in sorted(found, key=lambda entry: entry[:3])]


def _before_the_last(work: RankWork, done: int, end: int) -> int:
    """The step ahead of the last pass of a stage that ends at `end`, if `done` lies before that."""
    again = work.steps[end - 1].opcode is Opcode.RECOMPUTE
    step = end - 2 if again else end - 1
    return step if step > done else end


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


def _release_state(slots: Slots, unit: str, step: int, away: tuple[str, ...]) -> None:
    """RELEASE of the updated state of these kinds: it waits until the host has it."""
    for kind in away:
        buffer = (f"{kind}:{unit}",)
        slots.behind(step, unit_instruction(Opcode.RELEASE, unit, buffer, buffer))


def _instruction(
    update: _Update, verdicts: tuple[str, ...], options: PlanOptions, *, in_place: bool = False
) -> Instruction:
    on_host = options.update_on_host
    place = "host:" if on_host else ""
    source = f"host:reduced:{update.unit}" if on_host else update.source
    state: tuple[str, ...] = (f"{place}shard:{update.unit}", f"{place}moments:{update.unit}")
    if in_place:
        state = (*state, f"weights:{update.unit}")
    reads, writes = (source, *state, *verdicts), state
    if options.clip_delayed:
        reads, writes = (*reads, "clip:scale"), (*writes, f"square:{update.unit}")
    found = unit_instruction(Opcode.UPDATE, update.unit, reads, writes)
    return replace(found, stream=stream_of(Opcode.UPDATE, on_host=on_host))


def _gather(unit: str) -> Instruction:
    """The parts that the replicas have updated, brought together in the weights in place."""
    return unit_instruction(Opcode.GATHER, unit, (f"shard:{unit}",), (f"weights:{unit}",))


def _copies(unit: str, away: tuple[str, ...], options: PlanOptions) -> list[Instruction]:
    """What leaves the updated state in host memory; `away` are the kinds that live there."""
    shard, moments = f"shard:{unit}", f"moments:{unit}"
    if options.save and "shard" not in away:
        hosts = (f"host:{shard}", f"host:{moments}")
        return [unit_instruction(Opcode.SAVE, unit, (shard, moments), hosts)]
    names = [f"{kind}:{unit}" for kind in away]
    return [unit_instruction(Opcode.EVICT, unit, (name,), (f"host:{name}",)) for name in names]
