"""The checker against a second interpreter: whatever it lets through computes the right weights.

Every instruction of small plans is dropped, repeated, moved, and has its buffers, unit and
micro-batch changed. Each mutant that passes all rules is run on whole numbers in random orders.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from brute_force import StuckError, plain_weights, planned_weights
from test_check import chain_plan, with_program

from planner.check import check
from planner.errors import PlanFileError
from planner.plan.types import Instruction, Plan

PLANS: dict[str, Callable[[], Plan]] = {
    "one of everything": lambda: chain_plan(1, 1, 1),
    "plain": lambda: chain_plan(4, 2, 2),
    "recompute": lambda: chain_plan(4, 2, 2, recompute=True),
    "replicas": lambda: chain_plan(4, 2, 2, num_replicas=2),
    "partitioned": lambda: chain_plan(4, 2, 2, num_replicas=2, partition=3),
    "tied and skips": lambda: chain_plan(4, 2, 2, tied=((0, 3),), skips=((0, 2), (0, 3))),
    "tied on one rank": lambda: chain_plan(4, 2, 2, tied=((0, 2),)),
}


def mutants(plan: Plan, chooser: random.Random) -> Iterator[Plan]:
    for rank, program in enumerate(plan.programs):
        names = sorted({b for i in program for b in (*i.reads, *i.writes)})
        for index, instruction in enumerate(program):
            for lines in _moved(program, index, chooser):
                yield with_program(plan, rank, lines)
            for fresh in _altered(plan, instruction, names, chooser):
                lines = list(program)
                lines[index] = fresh
                yield with_program(plan, rank, lines)


def _moved(
    program: tuple[Instruction, ...], index: int, chooser: random.Random
) -> Iterator[list[Instruction]]:
    for place in (min(index + 1, len(program) - 1), chooser.randrange(len(program))):
        lines = list(program)
        lines[index], lines[place] = lines[place], lines[index]
        yield lines
    yield [*program[:index], *program[index + 1 :]]
    yield [*program[: index + 1], *program[index:]]


def _altered(
    plan: Plan, instruction: Instruction, names: list[str], chooser: random.Random
) -> Iterator[Instruction]:
    for field in ("reads", "writes"):
        buffers = getattr(instruction, field)
        for place in range(len(buffers)):
            without = (*buffers[:place], *buffers[place + 1 :])
            another = (*buffers[:place], chooser.choice(names), *buffers[place + 1 :])
            yield replace(instruction, **{field: without})
            yield replace(instruction, **{field: another})
    if instruction.micro_batch is not None:
        yield replace(instruction, micro_batch=(instruction.micro_batch + 1) % 2)
    if instruction.unit is not None:
        yield replace(instruction, unit=chooser.choice(plan.units).name)


def computes_right_weights(plan: Plan, seed: int) -> bool:
    wanted = plain_weights(plan)
    try:
        found = planned_weights(plan, seed)
    except StuckError:
        return False
    return all(wanted[name] == value for weights in found for name, value in weights.items())


def passes(plan: Plan) -> bool:
    try:
        return check(plan).passed
    except PlanFileError:
        return False


@pytest.mark.parametrize("name", PLANS)
def test_lowered_plans_compute_the_right_weights_in_any_order(name: str) -> None:
    plan = PLANS[name]()
    assert passes(plan)
    assert all(computes_right_weights(plan, seed) for seed in range(10))


@pytest.mark.parametrize("name", PLANS)
def test_no_wrong_mutant_passes(name: str) -> None:
    plan = PLANS[name]()
    num_mutants = num_passed = 0
    for seed, mutant in enumerate(mutants(plan, random.Random(0))):
        num_mutants += 1
        if passes(mutant):
            num_passed += 1
            assert computes_right_weights(mutant, seed), mutant.programs
    # Harmless ones exist (independent neighbours swapped), but most changes must be refused.
    assert num_passed < 0.3 * num_mutants


def test_the_second_interpreter_sees_wrong_weights() -> None:
    """Losing any SEND, BACKWARD or UPDATE shows, so the comparison above can fail."""
    plan = PLANS["plain"]()
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            if instruction.opcode.value in ("SEND", "BACKWARD", "UPDATE", "FORWARD"):
                lines = [*program[:index], *program[index + 1 :]]
                assert not computes_right_weights(with_program(plan, rank, lines), 0)
