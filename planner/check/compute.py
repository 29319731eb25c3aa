"""What FORWARD, RECOMPUTE, BACKWARD and its halves must find, and what they leave."""

from planner.check.expected import Form
from planner.check.symbols import NAMED, Gradient, State, describe, words
from planner.plan.types import Instruction, Unit

__all__ = ["run_compute"]


def run_compute(state: State, rank: int, instruction: Instruction) -> None:
    """Check everything the stage needs for this pass, then note what it leaves."""
    stage, micro_batch = instruction.stage or 0, instruction.micro_batch or 0
    form, suffix = state.expected.form(stage, instruction.opcode), f".{micro_batch}"
    held = state.held[rank]
    state.find_reads(rank, instruction)
    gradients = [(name + suffix, last) for name, last in form.gradients]
    sums = [b for b in instruction.writes if b.startswith("sum:")] if form.sums else []
    weights = _weights(state, rank, instruction, form, gradients, suffix, sums)
    found = [held.get(buffer) for buffer in weights]
    if found != list(form.units) and sorted(map(str, found)) != sorted(form.units):
        others = ", ".join(words(content) for content in found if content is not None)
        message = f"{describe(instruction)} needs the weights of {', '.join(form.units)}, but "
        state.fail(5, f"{message}finds {others or 'none'}", rank, weights[0] if weights else "")
    for buffer, last in gradients:
        if held.get(buffer) != last:
            state.need(rank, buffer, last)
    _check_writes(state, rank, instruction, form, suffix, sums)
    for name in form.writes:
        held[name + suffix] = NAMED
    for name in form.made:
        held[name + suffix] = stage
    for unit, buffer in zip(form.sums, sums, strict=False):
        _accumulate(state, rank, instruction, unit, buffer)


def _weights(
    state: State,
    rank: int,
    instruction: Instruction,
    form: Form,
    gradients: list[tuple[str, int]],
    suffix: str,
    sums: list[str],
) -> list[str]:
    """The weights buffers among what it reads; the rest must be what its form names."""
    reads = set(instruction.reads)
    wanted = {name + suffix for name in form.reads}
    wanted.update(form.weights)
    wanted.update(name for name, _ in gradients)
    pools = reads - wanted
    if sums:
        pools.difference_update(sums)
    lacking = wanted - reads
    extra = len(instruction.reads) - len(reads)
    if not state.plan.gathers:
        extra += len(pools)
    elif pools:
        extra += sum(not buffer.startswith("weights:") for buffer in pools)
    if lacking or extra:
        message = f"{describe(instruction)} reads {' '.join(instruction.reads)}: "
        what = f"it lacks {' '.join(sorted(lacking))}" if lacking else "that is too much"
        state.fail(5, message + what, rank)
    return list(form.weights) or sorted(b for b in pools if b.startswith("weights:"))


def _check_writes(
    state: State,
    rank: int,
    instruction: Instruction,
    form: Form,
    suffix: str,
    sums: list[str],
) -> None:
    """It writes what its form names, and a sum for each unit that needs one; nothing else."""
    writes = set(instruction.writes)
    wanted = {name + suffix for name in form.writes}
    wanted.update(name + suffix for name in form.made)
    wanted.update(sums)
    if writes == wanted and len(instruction.writes) == len(writes) and len(sums) == len(form.sums):
        return
    message = f"{describe(instruction)} writes {' '.join(instruction.writes) or 'nothing'}, not "
    message += " ".join(sorted(wanted - set(sums)))
    if form.sums:
        message += f" and sums of {', '.join(unit.name for unit in form.sums)}"
    state.fail(5, message, rank)


def _accumulate(state: State, rank: int, instruction: Instruction, unit: Unit, buffer: str) -> None:
    """Add the stage's gradient, and what later stages left for it, to the unit's sum."""
    stage, micro_batch = instruction.stage or 0, instruction.micro_batch or 0
    held = state.held[rank]
    total = held.get(buffer)
    if buffer not in instruction.reads:
        if isinstance(total, Gradient):
            message = f"{buffer} is overwritten while it holds the sum of {total.unit}"
            state.fail(5, message, rank, buffer)
        total = None
    elif isinstance(total, Gradient) and total.unit != unit.name:
        message = f"{buffer} holds the sum of {total.unit} where {unit.name} is added"
        state.fail(5, message, rank, buffer)
    if not isinstance(total, Gradient):
        total = held[buffer] = Gradient(unit=unit.name)
        if not state.expected.fits(rank, buffer, unit):
            entry = state.expected.tables[rank].get(buffer)
            message = f"{buffer} cannot hold the sum of {unit.name}: it is {entry}"
            state.fail(5, message, rank, buffer)
    for user in unit.stages if unit.exact else (stage,):
        added = total.added.get(user)
        if added is None:
            total.added[user] = [micro_batch]
            continue
        if added[-1] >= micro_batch:
            rule, what = (6, "twice") if micro_batch in added else (3, f"after {added[-1]}")
            message = f"the gradient of stage {user}, micro-batch {micro_batch} enters {buffer} "
            state.fail(rule, message + what, rank, buffer)
        added.append(micro_batch)
