"""What the instructions of a unit, and those over all units, must find, and what they leave.

They are GATHER, REDUCE, REDUCE_TIED, CHECK_FINITE, CLIP, UPDATE and SAVE, and the EVICT of a
gradient.
"""

from collections.abc import Iterable

from planner.check.symbols import (
    MIXED,
    NAMED,
    STATE,
    UPDATED,
    Content,
    Gradient,
    State,
    describe,
)
from planner.plan.types import Instruction, Opcode, Plan, Unit
from planner.schedules import Schedule

__all__ = ["evict_gradient", "run_of_unit", "run_over_units", "run_reduce_tied"]


def run_of_unit(state: State, rank: int, instruction: Instruction) -> None:
    """GATHER, REDUCE, UPDATE or SAVE of a unit, on one rank."""
    unit = state.expected.units[instruction.unit or ""]
    state.find_reads(rank, instruction)
    match instruction.opcode:
        case Opcode.GATHER if state.plan.gathers_updates:
            _gather_updates(state, rank, instruction, unit)
        case Opcode.GATHER:
            _gather(state, rank, instruction, unit)
        case Opcode.REDUCE:
            _reduce(state, rank, instruction, unit)
        case Opcode.UPDATE:
            _update(state, rank, instruction, unit)
        case _:
            _save(state, rank, instruction, unit)


def run_over_units(state: State, rank: int, instruction: Instruction) -> None:
    """CHECK_FINITE or CLIP on one rank: they look at every gradient of it, and spend none.

    A delayed CLIP looks at what the updates left of them.
    """
    finite = instruction.opcode is Opcode.CHECK_FINITE
    units = [u for u in state.plan.units if u.trainable and rank in u.ranks]
    if not finite and state.plan.options.clip_delayed:
        state.find_reads(rank, instruction)
        squares = [f"square:{unit.name}" for unit in units]
        _operands(state, rank, instruction, squares, "", 0, ["clip:scale"])
        return
    pooled = [unit for unit in units if not _is_reduced(state, unit)]
    named = [f"reduced:{unit.name}" for unit in units if _is_reduced(state, unit)]
    made = "finite" if finite else "scale"
    state.find_reads(rank, instruction)
    sums = _operands(state, rank, instruction, named, "sum:" if pooled else "", len(pooled), [made])
    held = [state.held[rank].get(buffer) for buffer in sums]
    by_unit = {content.unit: content for content in held if isinstance(content, Gradient)}
    for unit in units:
        found = by_unit.get(unit.name)
        if _is_reduced(state, unit):
            reduced = state.held[rank].get(f"reduced:{unit.name}")
            found = reduced if isinstance(reduced, Gradient) else None
        _need_whole(state, rank, instruction, unit, found)
    state.held[rank][made] = NAMED


def run_reduce_tied(state: State) -> None:
    """On all ranks that share the unit at once: each brings its part."""
    whole: Gradient | None = None
    for rank, index in state.cells:
        instruction = state.plan.programs[rank][index]
        unit = state.expected.units[instruction.unit or ""]
        reduced = f"reduced:{unit.name}"
        state.find_reads(rank, instruction)
        if len(unit.ranks) < 2:
            state.fail(5, f"{unit.name} is on one rank, so there is nothing to add over", rank)
        if state.plan.num_replicas > 1:
            _operands(state, rank, instruction, [reduced], "", 0, [reduced])
            part = state.held[rank].pop(reduced, None)
        else:
            pool = _operands(state, rank, instruction, [], "sum:", 1, [reduced])
            part = _take_sum(state, rank, instruction, unit, pool)
        if isinstance(part, Gradient):
            whole = whole or Gradient(unit=unit.name)
            whole.take(part)
    if whole is not None:
        for rank, _ in state.cells:
            state.held[rank][f"reduced:{whole.unit}"] = whole.copy()


def _gather(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    shard = f"shard:{unit.name}"
    pools = [buffer for buffer in instruction.writes if buffer.startswith("weights:")]
    _operands(state, rank, instruction, [shard], "", 0, pools)
    if not state.plan.gathers or len(pools) != 1:
        what = "one pool buffer of weights" if state.plan.gathers else "none: weights stay in place"
        state.fail(5, f"GATHER of {unit.name} may write {what}, not {instruction.writes}", rank)
    state.need(rank, shard, STATE)
    for buffer in pools:
        if state.plan.gathers and not state.expected.fits(rank, buffer, unit):
            entry = state.expected.tables[rank].get(buffer)
            state.fail(5, f"{buffer} cannot hold {unit.name}: it is {entry}", rank, buffer)
        state.held[rank][buffer] = unit.name


def _gather_updates(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    """The parts that all replicas have updated, into the weights in place."""
    shard, weights = f"shard:{unit.name}", f"weights:{unit.name}"
    _operands(state, rank, instruction, [shard], "", 0, [weights])
    state.need(rank, shard, UPDATED)
    state.held[rank][weights] = UPDATED


def _reduce(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    """The sum is spent; what was reduced before is kept where the instruction reads it."""
    reduced = f"reduced:{unit.name}"
    adds = reduced in instruction.reads
    pool = _operands(state, rank, instruction, [reduced] if adds else [], "sum:", 1, [reduced])
    if state.plan.num_replicas == 1:
        state.fail(5, f"REDUCE of {unit.name} has no replicas to reduce over", rank)
    total = _take_sum(state, rank, instruction, unit, pool)
    if total is None:
        return
    if state.plan.schedule is Schedule.LAYERED:
        local = [stage for stage in unit.stages if state.plan.stages[stage].rank == rank]
        fault = total.fault(local, state.plan.num_micro_batches)
        if fault:
            state.fail(6, f"REDUCE of {unit.name} finds {fault}", rank, next(iter(pool), ""))
    before = state.held[rank].get(reduced)
    if adds and isinstance(before, Gradient):
        before.take(total)
    else:
        state.held[rank][reduced] = total


def evict_gradient(state: State, rank: int, instruction: Instruction) -> None:
    """The unit's gradient as it is then, for an update on the host.

    On the device it is spent, unless verdicts on all gradients look at it.
    """
    plan, unit = state.plan, state.expected.units.get(instruction.unit or "")
    state.find_reads(rank, instruction)
    if unit is None or not plan.options.update_on_host:
        state.fail(5, f"{describe(instruction)} is of a gradient that no host updates with", rank)
        return
    reduced, host = f"reduced:{unit.name}", f"host:reduced:{unit.name}"
    if _is_reduced(state, unit):
        _operands(state, rank, instruction, [reduced], "", 0, [host])
        content: Content | None = state.held[rank].pop(reduced, None)
        found, source = (content if isinstance(content, Gradient) else None), reduced
    else:
        pool = _operands(state, rank, instruction, [], "sum:", 1, [host])
        found, source = _take_sum(state, rank, instruction, unit, pool), next(iter(pool), "")
    if found is not None:
        state.held[rank][host] = found.copy()
        if plan.options.updates_wait:
            state.held[rank][source] = found


def _update(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    plan, held = state.plan, state.held[rank]
    on_host = plan.options.update_on_host
    place = "host:" if on_host else ""
    own = [f"{place}shard:{unit.name}", f"{place}moments:{unit.name}"]
    own += [] if plan.gathers else [f"weights:{unit.name}"]
    verdicts = ["finite"] * plan.options.check_finite
    verdicts += [_scale_of(plan)] * (plan.options.clip_norm is not None)
    made = [*own, *[f"square:{unit.name}"] * plan.options.clip_delayed]
    reduced = f"{place}reduced:{unit.name}"
    for buffer, wanted in zip(own, (STATE, STATE, unit.name), strict=False):
        state.need(rank, buffer, wanted)
    if on_host or _is_reduced(state, unit):
        _operands(state, rank, instruction, [reduced, *own, *verdicts], "", 0, made)
        content: Content | None = held.pop(reduced, None)
        found = content if isinstance(content, Gradient) else None
    else:
        pool = _operands(state, rank, instruction, [*own, *verdicts], "sum:", 1, made)
        found = _take_sum(state, rank, instruction, unit, pool)
    _need_whole(state, rank, instruction, unit, found)
    held.update(dict.fromkeys(own, UPDATED))
    held.update(dict.fromkeys(made[len(own) :], NAMED))
    if plan.gathers_updates:
        held[f"weights:{unit.name}"] = MIXED


def _scale_of(plan: Plan) -> str:
    return "clip:scale" if plan.options.clip_delayed else "scale"


def _save(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    own = [f"shard:{unit.name}", f"moments:{unit.name}"]
    copies = [f"host:{buffer}" for buffer in own]
    _operands(state, rank, instruction, own, "", 0, copies)
    for buffer, copy in zip(own, copies, strict=True):
        state.need(rank, buffer, UPDATED)
        state.held[rank][copy] = UPDATED


def _is_reduced(state: State, unit: Unit) -> bool:
    """Whether a unit's gradient ends in `reduced:` rather than in its sum."""
    return state.plan.num_replicas > 1 or len(unit.ranks) > 1


def _operands(
    state: State,
    rank: int,
    instruction: Instruction,
    reads: Iterable[str],
    pool: str,
    num_pooled: int,
    writes: Iterable[str],
) -> list[str]:
    """Check that it has these operands and `num_pooled` of a pool besides; those are returned."""
    found, wanted = list(instruction.reads), set(reads)
    pooled = [b for b in found if pool and b.startswith(pool) and b not in wanted]
    rest = [buffer for buffer in found if buffer not in pooled]
    same = sorted(rest) == sorted(wanted) and len(set(pooled)) == len(pooled) == num_pooled
    if not same or sorted(instruction.writes) != sorted(writes):
        what = " ".join((*sorted(wanted), *[f"{pool}*"] * num_pooled)) or "nothing"
        message = f"{describe(instruction)} must read {what} and write {' '.join(sorted(writes))}, "
        message += f"but reads {' '.join(instruction.reads) or 'nothing'} and writes "
        state.fail(5, message + (" ".join(instruction.writes) or "nothing"), rank)
    return pooled


def _take_sum(
    state: State, rank: int, instruction: Instruction, unit: Unit, pool: list[str]
) -> Gradient | None:
    """The sum of the unit, which is then spent."""
    for buffer in pool:
        content = state.held[rank].get(buffer)
        if isinstance(content, Gradient) and content.unit == unit.name:
            del state.held[rank][buffer]
            return content
    held = [state.held[rank].get(buffer) for buffer in pool]
    others = ", ".join(f"that of {g.unit}" for g in held if isinstance(g, Gradient))
    message = f"{describe(instruction)} finds no sum of it, but {others or 'none'}"
    state.fail(6, message, rank, next(iter(pool), ""))
    return None


def _need_whole(
    state: State, rank: int, instruction: Instruction, unit: Unit, found: Gradient | None
) -> None:
    """The gradient is of every stage and micro-batch, each once; over all ranks if it is tied."""
    if found is None:
        state.fail(6, f"{describe(instruction)} finds no gradient of {unit.name}", rank)
        return
    local = [stage for stage in unit.stages if state.plan.stages[stage].rank == rank]
    fault = found.fault(local, state.plan.num_micro_batches)
    if fault:
        state.fail(6, f"{describe(instruction)} finds {fault}", rank)
    elif fault := found.fault(unit.stages, state.plan.num_micro_batches):
        state.fail(10, f"{describe(instruction)} finds {fault}: ranks differ", rank)
