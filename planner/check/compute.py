"""What LOAD, FORWARD, RECOMPUTE and BACKWARD must find, and what they leave."""

from planner.check.symbols import Content, State, Sum, words
from planner.lower.units import pool_name
from planner.plan.types import Instruction, Opcode, StagePlan, Unit

__all__ = ["run_compute", "run_load"]


def run_load(state: State, rank: int, instruction: Instruction) -> None:
    """Each written buffer then holds its key and micro-batch."""
    keys = {key.name for key in state.plan.batch}
    for buffer in instruction.writes:
        kind, _, rest = buffer.rpartition(":")
        key, _, micro_batch = rest.rpartition(".")
        if kind != "batch" or key not in keys or micro_batch != str(instruction.micro_batch):
            what = f"LOAD of micro-batch {instruction.micro_batch} writes {buffer}"
            state.fail(5, f"{what}, which is not a key of that part of the batch")
        state.held[rank][buffer] = ("named", buffer)


def run_compute(state: State, rank: int, instruction: Instruction) -> None:
    """Check everything the stage needs for this pass, then note what it leaves."""
    stage = state.plan.stages[instruction.stage or 0]
    for name in stage.units:
        _need_weights(state, rank, instruction, state.units[name])
    if instruction.opcode is Opcode.BACKWARD:
        made = _backward(state, rank, instruction, stage)
    else:
        made = _forward(state, rank, instruction, stage)
    for buffer in sorted(made.keys() - set(instruction.writes)):
        state.fail(5, f"{instruction.opcode.value} makes {buffer} but does not write it")
    for buffer in instruction.writes:
        if buffer not in state.sums[rank]:
            state.held[rank][buffer] = made.get(buffer, ("something else",))


def _forward(
    state: State, rank: int, instruction: Instruction, stage: StagePlan
) -> dict[str, Content]:
    micro_batch, recompute = instruction.micro_batch, instruction.opcode is Opcode.RECOMPUTE
    needed = [f"{name}.{micro_batch}" for name in stage.inputs]
    needed += [f"batch:{key}.{micro_batch}" for key in stage.batch_keys]
    for buffer in needed:
        state.need(rank, instruction, buffer, ("named", buffer))
    made = [] if recompute else [f"{name}.{micro_batch}" for name in stage.outputs]
    if stage.recompute == recompute:
        made.append(f"saved:{stage.index}.{micro_batch}")
    return {buffer: ("named", buffer) for buffer in made}


def _backward(
    state: State, rank: int, instruction: Instruction, stage: StagePlan
) -> dict[str, Content]:
    micro_batch = instruction.micro_batch or 0
    saved = f"saved:{stage.index}.{micro_batch}"
    state.need(rank, instruction, saved, ("named", saved))
    for buffer in instruction.reads:
        if ":" not in buffer or buffer.startswith("batch:"):
            state.need(rank, instruction, buffer, ("named", buffer))
    made: dict[str, Content] = {}
    specs = {tensor.name: tensor for tensor in state.plan.tensors}
    for name in (*stage.outputs, *stage.inputs):
        if name not in specs or not specs[name].requires_grad:
            continue
        buffer = f"gradient:{name}.{micro_batch}"
        later = tuple(reader for reader in state.readers[name] if reader > stage.index)
        if later:
            state.need(rank, instruction, buffer, ("gradient", name, micro_batch, later))
        if name in stage.inputs:
            made[buffer] = ("gradient", name, micro_batch, (stage.index, *later))
    for name in stage.units:
        if state.units[name].trainable:
            made |= _accumulate(state, rank, instruction, state.units[name])
    return made


def _need_weights(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    buffers = [buffer for buffer in instruction.reads if buffer.startswith("weights:")]
    found = [state.held[rank][buffer] for buffer in buffers if buffer in state.held[rank]]
    if ("weights", unit.name) not in found:
        what = f"{instruction.opcode.value} of stage {instruction.stage}"
        held = ", ".join(map(words, found)) or "none"
        state.fail(5, f"{what} needs the weights of {unit.name}, but finds {held}")


def _accumulate(
    state: State, rank: int, instruction: Instruction, unit: Unit
) -> dict[str, Content]:
    """Add the stage's gradient, and the part that later stages left, to the unit's sum."""
    stage, micro_batch = instruction.stage or 0, instruction.micro_batch or 0
    part, stages = f"part:{unit.name}.{micro_batch}", [stage]
    if part in instruction.reads:
        match state.held[rank].get(part):
            case ("part", _, _, tuple(others)):
                stages += others
            case found:
                state.fail(5, f"{part} holds {words(found or ())} where a gradient is needed")
    if part in instruction.writes:
        return {part: ("part", unit.name, micro_batch, tuple(stages))}
    prefix = f"sum:{pool_name(unit)}."
    buffer = next((name for name in instruction.writes if name.startswith(prefix)), None)
    if buffer is None:
        state.fail(5, f"BACKWARD of stage {stage} leaves the gradient of {unit.name} nowhere")
        return {}
    held = state.sums[rank].get(buffer)
    if held is None or buffer not in instruction.reads:
        if held and not held.consumed:
            state.fail(5, f"{buffer} is overwritten while it holds the sum of {held.unit}")
        held = state.sums[rank][buffer] = Sum(unit=unit.name)
    elif held.unit != unit.name or held.consumed:
        state.fail(5, f"{buffer} holds the sum of {held.unit} where {unit.name} is added")
    held.added.update((other, micro_batch) for other in stages)
    return {}
