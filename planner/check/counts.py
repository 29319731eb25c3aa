"""Rules 6 and 10, as far as they count instructions and compare tables."""

from collections import Counter
from collections.abc import Iterator

from planner.check.types import Cell, Failure
from planner.graph import DTYPE_BYTES
from planner.plan.flat import flat_length
from planner.plan.types import Opcode, Plan, Unit
from planner.schedules import Schedule

__all__ = ["cells_of", "count_failures", "end_of"]

_UNLIMITED = 1 << 62
_OF_GRADIENTS = (
    Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.CHECK_FINITE, Opcode.CLIP, Opcode.UPDATE, Opcode.SAVE,
)  # fmt: skip

_DONE = {
    Opcode.UPDATE: "updated",
    Opcode.REDUCE: "reduced",
    Opcode.REDUCE_TIED: "reduced over pipeline ranks",
    Opcode.GATHER: "gathered after its update",
}


def count_failures(plan: Plan) -> dict[int, Failure]:
    """The first failure of rules 6 and 10 that shows without running anything."""
    found: dict[int, Failure] = {}
    for rule, failure in (*_table_failures(plan), *_program_failures(plan)):
        found.setdefault(rule, failure)
    return found


def cells_of(plan: Plan, rank: int, opcode: Opcode, unit: str | None = None) -> tuple[Cell, ...]:
    """The instructions of one kind (and unit, if one is named) on a rank, the last first."""
    found = [
        (rank, index)
        for index, instruction in enumerate(plan.programs[rank])
        if instruction.opcode is opcode and unit in (None, instruction.unit)
    ]
    return tuple(reversed(found))


def end_of(plan: Plan, rank: int) -> tuple[Cell, ...]:
    """The last instruction of a rank, where something is missing that could stand anywhere."""
    return ((rank, len(plan.programs[rank]) - 1),) if plan.programs[rank] else ()


def _table_failures(plan: Plan) -> Iterator[tuple[int, Failure]]:
    held = Counter(name for unit in plan.units for name in unit.parameters)
    for parameter in plan.parameters:
        if held[parameter.name] > 1 or (parameter.trainable and not held[parameter.name]):
            message = f"parameter {parameter.name} is in {held[parameter.name]} units"
            yield 6, Failure(message=f"{message}: look at the plan's units")
    specs = {parameter.name: parameter for parameter in plan.parameters}
    for unit in plan.units:
        found = [specs[name] for name in unit.parameters]
        sizes = [parameter.num_elements for parameter in found]
        element_bytes = DTYPE_BYTES[unit.weights_dtype]
        length = flat_length(sizes, element_bytes, is_packed=plan.partition == 3)
        needed = (length, any(parameter.trainable for parameter in found))
        same = {(p.dtype, p.compute_dtype) for p in found} == {(unit.dtype, unit.compute_dtype)}
        if not same or needed != (unit.num_elements, unit.trainable):
            message = f"{unit.name} differs from its parameters in size, type or training"
            yield 6, Failure(message=f"{message}: look at the plan's units")
    users: dict[str, list[int]] = {unit.name: [] for unit in plan.units}
    for stage in plan.stages:
        for name in stage.units:
            users[name].append(stage.index)
    for unit in plan.units:
        homes = tuple(sorted({plan.stages[stage].rank for stage in unit.stages}))
        if homes != unit.ranks:
            message = f"ranks {homes} use {unit.name}, but {unit.ranks} hold it"
            yield 10, Failure(message=f"{message}: look at the plan's units")
        if tuple(users[unit.name]) != unit.stages:
            message = f"stages {users[unit.name]} use {unit.name}, but its entry names "
            yield 10, Failure(message=f"{message}{unit.stages}: look at the plan's units")


def _program_failures(plan: Plan) -> Iterator[tuple[int, Failure]]:
    units: list[list[Unit]] = [[] for _ in plan.programs]
    for unit in plan.units:
        for rank in unit.ranks:
            units[rank].append(unit)
    for rank, program in enumerate(plan.programs):
        counted = {*_OF_GRADIENTS, *([Opcode.GATHER] if plan.gathers_updates else [])}
        counts = Counter((i.opcode, i.unit) for i in program if i.opcode in counted)
        if plan.schedule is Schedule.FORWARD:
            for opcode, name in counts:
                message = f"{opcode.value} in a program that has no gradients"
                yield 6, Failure(message=message, cells=cells_of(plan, rank, opcode, name))
            continue
        for unit in units[rank]:
            for rule, opcode, least, most in _limits(plan, unit):
                number = counts[opcode, unit.name]
                if not least <= number <= most:
                    message = f"{unit.name} is {_DONE[opcode]} {number} times instead of {least}"
                    cells = cells_of(plan, rank, opcode, unit.name) or end_of(plan, rank)
                    yield rule, Failure(message=f"{message} on rank {rank}", cells=cells)
        for opcode, asked in (
            (Opcode.CHECK_FINITE, plan.options.check_finite),
            (Opcode.CLIP, plan.options.clip_norm is not None),
        ):
            number = sum(times for (found, _), times in counts.items() if found is opcode)
            if number != asked:
                message = f"rank {rank} has {number} {opcode.value} instead of {int(asked)}"
                cells = cells_of(plan, rank, opcode) or end_of(plan, rank)
                yield 6, Failure(message=message, cells=cells)


def _limits(plan: Plan, unit: Unit) -> Iterator[tuple[int, Opcode, int, int]]:
    """(rule, opcode, least, most) instructions of a unit on each of its ranks."""
    once = int(unit.trainable)
    yield 6, Opcode.UPDATE, once, once
    reduced = once * (plan.num_replicas > 1)
    layered = plan.schedule is Schedule.LAYERED
    yield 6, Opcode.REDUCE, reduced, reduced if layered or not reduced else _UNLIMITED
    if plan.gathers_updates:
        yield 6, Opcode.GATHER, once, once
    tied = once * (len(unit.ranks) > 1)
    yield 10, Opcode.REDUCE_TIED, tied, tied
