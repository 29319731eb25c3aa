"""Plans changed by hand: for tests of the rules."""

from collections.abc import Sequence
from dataclasses import replace

from planner.check import check
from planner.plan.types import Instruction, Opcode, Plan, Prediction

__all__ = [
    "broken_rules", "changed", "counterexample", "dropped", "find", "limited", "moved", "repeated",
    "swapped", "with_buffer", "with_program",
]  # fmt: skip


def broken_rules(plan: Plan) -> set[int]:
    """The numbers of the rules that the plan breaks."""
    return {verdict.number for verdict in check(plan).failures}


def counterexample(plan: Plan, rule: int) -> str:
    """What the checker shows for a rule that the plan breaks."""
    verdict = check(plan).verdicts[rule - 1]
    assert not verdict.passed
    return verdict.counterexample


def find(plan: Plan, rank: int, opcode: Opcode, number: int = 0, **fields: object) -> int:
    """Index of an instruction in a rank's program."""
    return [
        index
        for index, instruction in enumerate(plan.programs[rank])
        if instruction.opcode is opcode
        and all(getattr(instruction, name) == value for name, value in fields.items())
    ][number]


def with_program(plan: Plan, rank: int, program: Sequence[Instruction]) -> Plan:
    programs = list(plan.programs)
    programs[rank] = tuple(program)
    return replace(plan, programs=tuple(programs))


def dropped(plan: Plan, rank: int, index: int) -> Plan:
    program = list(plan.programs[rank])
    del program[index]
    return with_program(plan, rank, program)


def repeated(plan: Plan, rank: int, index: int) -> Plan:
    """The instruction stands twice, the second right behind the first."""
    program = list(plan.programs[rank])
    program.insert(index + 1, program[index])
    return with_program(plan, rank, program)


def swapped(plan: Plan, rank: int, one: int, other: int) -> Plan:
    program = list(plan.programs[rank])
    program[one], program[other] = program[other], program[one]
    return with_program(plan, rank, program)


def moved(plan: Plan, rank: int, index: int, before: int) -> Plan:
    """The instruction stands before another one instead."""
    program = list(plan.programs[rank])
    program.insert(before if before <= index else before - 1, program.pop(index))
    return with_program(plan, rank, program)


def changed(plan: Plan, rank: int, index: int, **fields: object) -> Plan:
    program = list(plan.programs[rank])
    program[index] = replace(program[index], **fields)  # type: ignore[arg-type]
    return with_program(plan, rank, program)


def with_buffer(plan: Plan, rank: int, name: str, **fields: object) -> Plan:
    """One entry of a rank's table of buffers changed."""
    assert any(buffer.name == name for buffer in plan.buffers[rank])
    table = tuple(
        replace(buffer, **fields) if buffer.name == name else buffer  # type: ignore[arg-type]
        for buffer in plan.buffers[rank]
    )
    return replace(plan, buffers=(*plan.buffers[:rank], table, *plan.buffers[rank + 1 :]))


def limited(plan: Plan, memory_limit_bytes: int) -> Plan:
    """The plan with this limit on every rank's memory."""
    prediction = Prediction(
        step_seconds=1.0,
        bubble=0.0,
        peak_bytes=(0,) * plan.num_pipeline_ranks,
        memory_limit_bytes=memory_limit_bytes,
        provenance="made up",
    )
    return replace(plan, prediction=prediction)
