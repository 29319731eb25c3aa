"""The partial order against its definition, on random programs of one rank and of several."""

import random
from dataclasses import replace

import pytest
from plans import minimal_plan
from synthetic import chain_plan

from planner.plan.dependencies import Lists, PartialOrder, partial_order
from planner.plan.types import Instruction, Opcode, Plan
from planner.schedules import Schedule

STREAMS = {
    "compute": Opcode.FORWARD,
    "data": Opcode.GATHER,
    "copy.in": Opcode.LOAD,
    "copy.out": Opcode.EVICT,
}


def random_program(chooser: random.Random, num_instructions: int) -> tuple[Instruction, ...]:
    buffers = [f"b{i}.0" for i in range(5)]

    def some() -> tuple[str, ...]:
        return tuple(chooser.sample(buffers, chooser.choice((0, 1, 1, 2))))

    streams = chooser.choices(tuple(STREAMS), weights=(1, 2, 2, 2), k=num_instructions)
    return tuple(
        Instruction(opcode=STREAMS[stream], stream=stream, reads=some(), writes=some())
        for stream in streams
    )


def issue_waits(program: tuple[Instruction, ...], index: int) -> set[int]:
    """What must be over when an instruction is issued, straight from the definition."""
    if index < 0:
        return set()
    new, found = program[index], issue_waits(program, index - 1)
    for earlier, old in enumerate(program[:index]):
        conflict = {*new.reads, *new.writes} & {*old.writes} or {*new.writes} & {*old.reads}
        if old.stream == "compute" or conflict:
            found.add(earlier)
    return found


def run_waits(program: tuple[Instruction, ...], index: int) -> set[int]:
    """What must be over when it runs: also its predecessor in its stream."""
    same = [i for i in range(index) if program[i].stream == program[index].stream]
    return issue_waits(program, index) | set(same[-1:])


def closure(direct: list[set[int]]) -> list[set[int]]:
    """Everything that must be over, not only what is named; predecessors have lower numbers."""
    found: list[set[int]] = []
    for earlier in direct:
        found.append(earlier.union(*(found[other] for other in earlier)))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_one_rank_waits_for_what_the_definition_says(seed: int) -> None:
    chooser = random.Random(seed)
    program = random_program(chooser, chooser.randint(1, 14))
    plan = replace(minimal_plan(), programs=(program,))
    order, indices = partial_order(plan), range(len(program))
    assert order.task_of == [list(indices)]
    assert closure([set(found) for found in order.predecessors]) == closure(
        [run_waits(program, index) for index in indices]
    )
    # What holds up the issue, with all that this implies.
    before = closure([run_waits(program, index) for index in indices])
    held: set[int] = set()
    for index in indices:
        held |= set(order.held_by[0][index])
        wanted = issue_waits(program, index)
        assert held.union(*(before[i] for i in held)) == wanted.union(*(before[i] for i in wanted))


def test_few_predecessors_are_named() -> None:
    """The cost of a plan is linear: no instruction names more than one of each stream, but for its
    own stream one that its issue waits for and one that it runs behind.
    """
    chooser = random.Random(0)
    program = random_program(chooser, 5000)
    order = partial_order(replace(minimal_plan(), programs=(program,)))
    assert max(len(found) for found in order.predecessors) <= len(STREAMS) + 1
    assert len(order.predecessors.items) + len(order.held_by[0].items) < 6 * len(program)


PLANS: dict[str, Plan] = {
    "layered": chain_plan(6, 3, 3, tied=((0, 5),)),
    "1F1B": chain_plan(3, 3, 4, schedule=Schedule.ONE_F_ONE_B, num_replicas=2, partition=3),
}


@pytest.mark.parametrize("name", PLANS)
def test_ends_of_a_transfer_are_one_task(name: str) -> None:
    plan = PLANS[name]
    order = partial_order(plan)
    cells = [cell for members in order.members for cell in members]
    assert len(cells) == len(set(cells)) == sum(map(len, plan.programs))
    for task, members in enumerate(order.members):
        for rank, index in members:
            assert order.task_of[rank][index] == task
        opcodes = [plan.programs[rank][index].opcode for rank, index in members]
        if Opcode.SEND in opcodes:
            assert opcodes == [Opcode.SEND, Opcode.RECEIVE]
        if Opcode.REDUCE_TIED in opcodes:
            assert sorted(rank for rank, _ in members) == [0, 2]
    assert not order.mismatches
    check_sorted(order)


def check_sorted(order: PartialOrder) -> None:
    tasks = order.sorted_tasks()
    assert sorted(tasks) == list(range(len(order.members)))
    place = {task: position for position, task in enumerate(tasks)}
    followers = order.followers()
    for task, earlier in enumerate(order.predecessors):
        assert all(place[other] < place[task] for other in earlier)
        assert all(task in followers[other] for other in earlier)
    assert len(followers.items) == len(order.predecessors.items)


def test_empty_programs() -> None:
    order = partial_order(replace(minimal_plan(2), programs=((), ())))
    assert order.members == []
    assert order.sorted_tasks() == []
    assert len(order.predecessors) == 0
    assert [len(held) for held in order.held_by] == [0, 0]


def test_lists() -> None:
    lists = Lists(starts=[0, 2, 2, 3], items=[5, 6, 7])
    assert list(lists) == [[5, 6], [], [7]]
    assert len(lists) == 3
    assert lists.lengths().tolist() == [2, 0, 1]
    assert lists.owners().tolist() == [0, 0, 2]
