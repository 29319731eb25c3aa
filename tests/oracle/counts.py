"""What must stand in the programs how often, and in which order of compute.

Compute is one stream that holds up the issue, so in every interleaving a rank computes in program
order, and an instruction runs exactly as often as it stands there.
"""

from collections import Counter
from collections.abc import Iterator

from oracle.facts import BACKWARDS, Facts, Fault
from planner.graph import DTYPE_BYTES
from planner.plan.types import Instruction, Opcode, Unit
from planner.schedules import Schedule

__all__ = ["miscounted"]


def miscounted(facts: Facts) -> Iterator[Fault]:
    """Layers, passes, traffic and updates that are too few or too many; the layered order."""
    plan = facts.plan
    if [layer for stage in plan.stages for layer in stage.layers] != list(plan.layer_names):
        yield Fault(kind="count", message="the stages do not hold each layer once")
    yield from _passes(facts)
    yield from _tables(facts)
    for rank, program in enumerate(plan.programs):
        for unit in plan.units:
            calls = Counter(i.opcode for i in program if i.unit == unit.name)
            for opcode, low, high in _limits(facts, rank, unit):
                if not low <= calls[opcode] <= high:
                    message = f"{calls[opcode]} x {opcode} of {unit.name} on rank {rank}"
                    yield Fault(kind="count", message=f"{message}, not {low} to {high}")
        for opcode, asked in (
            (Opcode.CHECK_FINITE, plan.options.check_finite),
            (Opcode.CLIP, plan.options.clip_norm is not None),
        ):
            found = sum(i.opcode is opcode for i in program)
            if found != (asked and facts.trains):
                yield Fault(kind="count", message=f"{found} x {opcode} on rank {rank}")
        if plan.schedule is Schedule.LAYERED and not _is_layered(program):
            yield Fault(kind="order", message=f"rank {rank} leaves the layered order")
        if plan.schedule not in (Schedule.FORWARD, Schedule.CUSTOM):
            for stage in plan.stages:
                ran = [i for i in program if i.opcode is Opcode.FORWARD and i.stage == stage.index]
                order = [i.micro_batch or 0 for i in ran]
                if order != sorted(order):
                    yield Fault(kind="order", message=f"stage {stage.index}: forward {order}")


def _tables(facts: Facts) -> Iterator[Fault]:
    """Units against their parameters, and the keys that the code draws."""
    plan = facts.plan
    calls = [call for stage in plan.stages for call in stage.code]
    keys = [c.first_random_operator + i for c in calls for i in range(c.num_random_operators)]
    if sorted(keys) != list(range(plan.num_random_operators)) or plan.num_random_operators < 0:
        yield Fault(kind="count", message=f"keys {keys} are drawn")
    for unit in plan.units:
        found = [p for p in plan.parameters if p.name in unit.parameters]
        length_bytes = 0
        for parameter in found:  # weights in parts are packed, else each is aligned
            length_bytes += -length_bytes % 64 if plan.partition != 3 else 0
            length_bytes += parameter.num_elements * DTYPE_BYTES[unit.compute_dtype or unit.dtype]
        element_bytes = DTYPE_BYTES[unit.compute_dtype or unit.dtype]
        if length_bytes != unit.num_elements * element_bytes or any(
            (p.dtype, p.compute_dtype) != (unit.dtype, unit.compute_dtype) for p in found
        ):
            yield Fault(kind="count", message=f"{unit.name} is not as large as its parameters")
        if unit.trainable != any(p.trainable for p in found):
            yield Fault(kind="count", message=f"{unit.name} is wrongly trained")
    for parameter in plan.parameters:
        number = sum(unit.parameters.count(parameter.name) for unit in plan.units)
        if number > 1 or (parameter.trainable and not number):
            yield Fault(kind="count", message=f"{parameter.name} is in {number} units")


def _passes(facts: Facts) -> Iterator[Fault]:
    """Forward once, then once more where it recomputes; backward once, whole or in two halves."""
    programs = facts.plan.programs
    runs: dict[tuple[int | None, int | None], list[Opcode]] = {}
    for instruction in (i for program in programs for i in program):
        if instruction.opcode in (Opcode.FORWARD, Opcode.RECOMPUTE, *BACKWARDS):
            key = (instruction.stage, instruction.micro_batch)
            runs.setdefault(key, []).append(instruction.opcode)
    halves = [Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT]
    for stage in facts.plan.stages:
        once_more = [Opcode.RECOMPUTE] * (stage.recompute and facts.trains)
        for m in range(facts.plan.num_micro_batches):
            found = runs.get((stage.index, m), [])
            backward = [opcode for opcode in found if opcode in BACKWARDS]
            forward = [opcode for opcode in found if opcode not in BACKWARDS]
            options = [[Opcode.BACKWARD], halves] if facts.trains else [[]]
            if forward != [Opcode.FORWARD, *once_more] or backward not in options:
                yield Fault(kind="count", message=f"stage {stage.index}, {m}: {found}")


def _limits(facts: Facts, rank: int, unit: Unit) -> Iterator[tuple[Opcode, int, int]]:
    """(opcode, least, most) calls for a unit on a rank."""
    plan, unlimited = facts.plan, 10**9
    trained = facts.trains and unit.trainable and rank in unit.ranks
    layered = plan.schedule is Schedule.LAYERED
    reduces = trained and plan.num_replicas > 1
    local = sum(plan.stages[stage].rank == rank for stage in unit.stages)
    claims = plan.schedule in (Schedule.LAYERED, Schedule.FORWARD)
    yield Opcode.UPDATE, int(trained), int(trained)
    yield Opcode.REDUCE, int(reduces), (int(reduces) if layered else unlimited)
    if facts.joins_updates:
        yield Opcode.GATHER, int(trained), int(trained)
    else:
        yield Opcode.GATHER, 0, (local * (2 if facts.trains else 1) if claims else unlimited)


def _is_layered(program: tuple[Instruction, ...]) -> bool:
    """Forward by stage; then backward by stage, last first, micro-batches ascending."""
    forward = [(i, s.stage or 0) for i, s in enumerate(program) if s.opcode is Opcode.FORWARD]
    backward = [
        (index, -(step.stage or 0), step.micro_batch or 0)
        for index, step in enumerate(program)
        if step.opcode in BACKWARDS
    ]
    stages, steps = [stage for _, stage in forward], [step[1:] for step in backward]
    apart = not forward or not backward or forward[-1][0] < backward[0][0]
    return apart and stages == sorted(stages) and steps == sorted(steps)
