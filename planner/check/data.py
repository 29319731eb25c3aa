"""What GATHER, RELEASE, REDUCE, REDUCE_TIED and UPDATE must find, and what they leave."""

from planner.check.symbols import State, words
from planner.check.types import Failure
from planner.plan.types import Instruction, Opcode, Plan, Unit

__all__ = ["read_after_release", "run_data", "run_reduce_tied"]


def run_data(state: State, rank: int, instruction: Instruction) -> None:
    """Any of them but REDUCE_TIED, on one rank."""
    unit = state.units[instruction.unit or ""]
    match instruction.opcode:
        case Opcode.GATHER:
            _gather(state, rank, instruction, unit)
        case Opcode.RELEASE:
            for buffer in instruction.reads:
                state.need(rank, instruction, buffer, ("weights", unit.name))
        case Opcode.REDUCE:
            state.num_reduced[unit.name, rank] += 1
            _take_sum(state, rank, instruction, unit)
            for buffer in instruction.writes:
                state.held[rank][buffer] = ("reduced", unit.name, (rank,))
        case _:
            _update(state, rank, instruction, unit)


def run_reduce_tied(state: State) -> None:
    """On all ranks that share the unit at once: each brings its part."""
    rank, index = state.cells[0]
    name = state.plan.programs[rank][index].unit or ""
    ranks = tuple(sorted(rank for rank, _ in state.cells))
    for rank, index in state.cells:
        instruction = state.plan.programs[rank][index]
        state.num_tied[name, rank] += 1
        if state.plan.num_replicas > 1:
            state.need(rank, instruction, f"reduced:{name}", ("reduced", name, (rank,)))
        else:
            _take_sum(state, rank, instruction, state.units[name])
    for rank, index in state.cells:
        for buffer in state.plan.programs[rank][index].writes:
            state.held[rank][buffer] = ("reduced", name, ranks)


def read_after_release(plan: Plan) -> Failure | None:
    """A gather buffer is not read between its RELEASE and the next GATHER into it."""
    for rank, program in enumerate(plan.programs):
        released: dict[str, int] = {}
        for index, instruction in enumerate(program):
            for buffer in instruction.reads:
                if buffer in released:
                    message = f"{buffer} is read after it was released"
                    return Failure(message=message, cells=((rank, index), (rank, released[buffer])))
            for buffer in instruction.writes:
                released.pop(buffer, None)
            if instruction.opcode is Opcode.RELEASE:
                released.update((buffer, index) for buffer in instruction.reads)
    return None


def _gather(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    state.need(rank, instruction, f"shard:{unit.name}", ("state", unit.name))
    if len(instruction.writes) != 1:
        state.fail(5, f"GATHER writes {len(instruction.writes)} buffers instead of one")
    for buffer in instruction.writes:
        state.held[rank][buffer] = ("weights", unit.name)


def _take_sum(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    """The sum read is that of every micro-batch of every local stage of the unit, each once."""
    sums = [state.sums[rank][name] for name in instruction.reads if name in state.sums[rank]]
    held = next((found for found in sums if found.unit == unit.name), None)
    what = f"{instruction.opcode.value} of {unit.name}"
    if held is None:
        others = ", ".join(found.unit for found in sums) or "none"
        state.fail(6, f"{what} finds no gradient of it, but {others}")
        return
    stages = [stage for stage in unit.stages if state.plan.stages[stage].rank == rank]
    for stage in stages:
        for micro_batch in range(state.plan.num_micro_batches):
            if (times := held.added[stage, micro_batch]) != 1:
                what += f" finds the gradient of stage {stage}, micro-batch {micro_batch}"
                state.fail(6, f"{what} added {times} times instead of once")
                return
    if held.consumed:
        state.fail(6, f"{what} takes a sum that was taken before")
    held.consumed = True


def _update(state: State, rank: int, instruction: Instruction, unit: Unit) -> None:
    state.num_updated[unit.name, rank] += 1
    shard = f"shard:{unit.name}"
    state.need(rank, instruction, shard, ("state", unit.name))
    if state.plan.num_replicas > 1 or len(unit.ranks) > 1:
        found = state.held[rank].get(f"reduced:{unit.name}", ())
        if f"reduced:{unit.name}" not in instruction.reads:
            state.fail(6, f"UPDATE of {unit.name} does not read its reduced gradient")
        elif found != ("reduced", unit.name, unit.ranks):
            rule = 10 if len(unit.ranks) > 1 else 6
            state.fail(rule, f"UPDATE of {unit.name} finds {words(found)}, not the whole gradient")
    else:
        _take_sum(state, rank, instruction, unit)
    wanted = {shard} if state.plan.partition else {shard, f"weights:{unit.name}"}
    if set(instruction.writes) != wanted:
        state.fail(6, f"UPDATE of {unit.name} writes {instruction.writes}, not {sorted(wanted)}")
    for buffer in instruction.writes:
        state.held[rank][buffer] = ("updated", unit.name)
