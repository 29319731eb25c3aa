"""Rules 5 to 8: what the symbolic run finds, memory, and the traffic of the state."""

from collections import Counter
from dataclasses import fields

from planner.check.compute import run_compute
from planner.check.counts import cells_of, end_of
from planner.check.data import run_of_unit, run_over_units, run_reduce_tied
from planner.check.expected import COMPUTE
from planner.check.moves import run_copy, run_load, run_release, run_transfer
from planner.check.symbols import UPDATED, State, words
from planner.check.types import Cell, Failure
from planner.plan.dependencies import PartialOrder
from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule
from planner.simulate.memory import worst_moments

__all__ = ["claims_traffic", "memory_fits", "run_on_symbols", "state_traffic"]


def run_on_symbols(plan: Plan, order: PartialOrder, tasks: list[int]) -> dict[int, Failure]:
    """The first failure of rules 3, 5, 6 and 10 that shows in what buffers hold, by number.

    Conflicting uses of a buffer are ordered by the plan itself: a reader waits for the last writer,
    a writer for the last writer and the readers since. So what an instruction finds does not depend
    on the interleaving, and one run in any permitted order speaks for all of them. (What REDUCE and
    UPDATE spend, others wait for before or after them: they share a stream, or an operand is
    written.)

    Args:
        tasks: those of `order` that can run, in such an order.
    """
    state = State(plan)
    programs, unfit = plan.programs, state.expected.unfit
    for task in tasks:
        cells = state.cells = order.members[task]
        rank, index = cells[0]
        instruction = programs[rank][index]
        opcode = instruction.opcode
        if opcode in COMPUTE:
            run_compute(state, rank, instruction)
        elif opcode is Opcode.SEND or opcode is Opcode.RECEIVE:
            run_transfer(state)
            continue  # what they move is compared with the tables by rule 4
        elif opcode is Opcode.LOAD:
            run_load(state, rank, instruction)
        elif opcode is Opcode.REDUCE_TIED:
            run_reduce_tied(state)
        elif opcode in (Opcode.CHECK_FINITE, Opcode.CLIP):
            for rank, index in cells:
                run_over_units(state, rank, programs[rank][index])
        elif opcode in (Opcode.FETCH, Opcode.EVICT):
            run_copy(state, rank, instruction)
        elif opcode is Opcode.RELEASE:
            run_release(state, rank, instruction)
        else:
            run_of_unit(state, rank, instruction)
        for rank, index in cells:
            if unfit[rank]:
                state.fit(rank, programs[rank][index])
    if len(tasks) == len(order.members):
        _check_end(state)
    return state.failures


def _check_end(state: State) -> None:
    """Rule 6 at the end of the step: the updated state is wherever the plan says it will be.

    That is the host, and weights in place of which each replica updates a part.
    """
    plan = state.plan
    hosts = ("shard", "moments") if plan.options.save else plan.offloaded
    prefixes = [f"host:{kind}" for kind in hosts] + ["weights"] * plan.gathers_updates
    if plan.schedule is Schedule.FORWARD:
        return
    for unit in plan.units:
        for rank in unit.ranks if unit.trainable else ():
            for buffer in (f"{prefix}:{unit.name}" for prefix in prefixes):
                found = state.held[rank].get(buffer)
                if found != UPDATED:
                    state.cells = _last_writer(plan, rank, buffer) or end_of(plan, rank)
                    what = "nothing" if found is None else words(found)
                    message = f"at the end of the step {buffer} of rank {rank} holds {what}, not "
                    state.fail(6, message + UPDATED)
                    return


def _last_writer(plan: Plan, rank: int, buffer: str) -> tuple[Cell, ...]:
    writers = [(rank, i) for i, step in enumerate(plan.programs[rank]) if buffer in step.writes]
    return tuple(writers[-1:])


def state_traffic(plan: Plan) -> Failure | None:
    """Rule 8: at most one gather per stage and pass, and one reduction, whatever M is.

    The layered order and evaluation claim it; other schedules pass micro-batches too early. Updated
    parts of weights are gathered once for all passes, which rule 6 asks of every order.
    """
    if not claims_traffic(plan):
        return None
    num_passes = 1 if plan.schedule is Schedule.FORWARD else 2
    stage_ranks = [stage.rank for stage in plan.stages]
    for rank, program in enumerate(plan.programs):
        counts: Counter[tuple[Opcode, str | None]] = Counter(
            (i.opcode, i.unit) for i in program if i.opcode in (Opcode.GATHER, Opcode.REDUCE)
        )
        for unit in plan.units:
            local = sum(stage_ranks[stage] == rank for stage in unit.stages)
            gathers = 1 if plan.gathers_updates else num_passes * local
            for opcode, most in ((Opcode.GATHER, gathers), (Opcode.REDUCE, 1)):
                number = counts[opcode, unit.name]
                if number > most:
                    message = f"rank {rank} has {number} {opcode.value} of {unit.name}, but its "
                    message += f"stages and passes need at most {most}"
                    return Failure(message=message, cells=cells_of(plan, rank, opcode, unit.name))
    return None


def claims_traffic(plan: Plan) -> bool:
    """Whether rule 8 is asked of the plan's schedule."""
    return plan.schedule in (Schedule.LAYERED, Schedule.FORWARD)


def memory_fits(plan: Plan, order: PartialOrder) -> Failure | None:
    """Rule 7: the most that any interleaving can hold, on every rank, is within the limit."""
    if plan.prediction is None:
        return None
    for rank, moment in enumerate(worst_moments(plan, order)):
        limit = plan.prediction.limit_of(rank)
        excess = moment.memory.total_bytes - limit
        if excess > 0:
            classes = {f.name: getattr(moment.memory, f.name) for f in fields(moment.memory)}
            parts = [f"{number} of {name}" for name, number in classes.items() if number]
            return Failure(
                message=f"rank {rank} can hold {moment.memory.total_bytes} bytes at once, {excess} "
                f"more than the limit of {limit}, when this is issued: {', '.join(parts)}",
                cells=((rank, moment.index),) if plan.programs[rank] else (),
            )
    return None
