"""Rules 5 to 8 and 10: what the symbolic run found, and counts over whole programs."""

from collections import Counter

from planner.check.compute import run_compute, run_load
from planner.check.data import read_after_release, run_data, run_reduce_tied
from planner.check.symbols import State
from planner.check.types import Failure
from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan
from planner.simulate.memory import peak_memory

__all__ = ["memory_fits", "run_on_symbols", "state_traffic"]


def run_on_symbols(plan: Plan) -> dict[int, Failure]:
    """The first failure of rules 5, 6 and 10, by number.

    Conflicting uses of a buffer are ordered by the plan itself, so what an instruction finds does
    not depend on the interleaving: one run in any permitted order speaks for all of them.
    """
    state = State.at_start(plan)
    order = partial_order(plan)
    for task in order.sorted_tasks():
        state.cells = order.members[task]
        rank, index = state.cells[0]
        instruction = plan.programs[rank][index]
        state.find_reads()
        match instruction.opcode:
            case Opcode.LOAD:
                run_load(state, rank, instruction)
            case Opcode.FORWARD | Opcode.RECOMPUTE | Opcode.BACKWARD:
                run_compute(state, rank, instruction)
            case Opcode.SEND:
                _deliver(state)
            case Opcode.RECEIVE:
                pass  # without a partner: nothing arrives
            case Opcode.REDUCE_TIED:
                run_reduce_tied(state)
            case _:
                run_data(state, rank, instruction)
    released = read_after_release(plan)
    if released:
        state.failures.setdefault(5, released)
    _count(state)
    return state.failures


def _deliver(state: State) -> None:
    """What SEND reads is what RECEIVE writes."""
    (rank, index), *receivers = state.cells
    content = state.held[rank].get(state.plan.programs[rank][index].reads[0])
    for receiver, position in receivers:
        for buffer in state.plan.programs[receiver][position].writes:
            if content is not None:
                state.held[receiver][buffer] = content


def _count(state: State) -> None:
    """Rules 6 and 10 at the end of the step; parameters that no unit holds."""
    plan, state.cells = state.plan, ()
    for unit in plan.units:
        homes = tuple(sorted({plan.stages[stage].rank for stage in unit.stages}))
        if homes != unit.ranks:
            state.fail(10, f"ranks {homes} use {unit.name}, but {unit.ranks} hold it")
        for rank in unit.ranks:
            key, once = (unit.name, rank), int(unit.trainable)
            for rule, what, counts, wanted in (
                (6, "reduced", state.num_reduced, once * (plan.num_replicas > 1)),
                (6, "updated", state.num_updated, once),
                (10, "reduced over pipeline ranks", state.num_tied, once * (len(homes) > 1)),
            ):
                if counts[key] != wanted:
                    message = f"{unit.name} is {what} {counts[key]} times instead of {wanted}"
                    state.fail(rule, f"{message} on rank {rank}")
    held = Counter(name for unit in plan.units for name in unit.parameters)
    for parameter in plan.parameters:
        if held[parameter.name] > 1 or (parameter.trainable and not held[parameter.name]):
            state.fail(6, f"parameter {parameter.name} is in {held[parameter.name]} units")


def state_traffic(plan: Plan) -> Failure | None:
    """Rule 8: at most one gather per stage and pass, and one reduction, whatever M is."""
    for rank, program in enumerate(plan.programs):
        for opcode, per_stage in ((Opcode.GATHER, 2), (Opcode.REDUCE, 1)):
            counts = Counter(i.unit for i in program if i.opcode is opcode)
            for unit in plan.units:
                local = sum(plan.stages[stage].rank == rank for stage in unit.stages)
                most = per_stage * local if opcode is Opcode.GATHER else 1
                if counts[unit.name] > most:
                    cells = [
                        (rank, index)
                        for index, i in enumerate(program)
                        if i.opcode is opcode and i.unit == unit.name
                    ]
                    return Failure(
                        message=f"rank {rank} has {counts[unit.name]} {opcode.value} of "
                        f"{unit.name}; the layered order needs at most {most}",
                        cells=tuple(reversed(cells)),
                    )
    return None


def memory_fits(plan: Plan) -> Failure | None:
    """Rule 7: the most that any interleaving can hold, on every rank, is within the limit."""
    if plan.prediction is None:
        return None
    limit = plan.prediction.memory_limit_bytes
    for rank, moment in enumerate(peak_memory(plan)):
        if moment.total_bytes > limit:
            return Failure(
                message=f"rank {rank} can hold {moment.total_bytes} bytes at once, "
                f"{moment.total_bytes - limit} more than the limit of {limit}: {moment}"
            )
    return None
