"""Bytes on the wire: what passes the process groups is what the simulator counts, to the byte."""

from collections import Counter
from pathlib import Path

import pytest
from planned import plan_of
from test_transport import Job
from wire_ranks import MODEL

from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan
from planner.simulate.durations import Durations

NUM_MICRO_BATCHES = (1, 2, 8)
OF_STATE = (Opcode.GATHER, Opcode.REDUCE, Opcode.REDUCE_TIED)


def plans(num_replicas: int, num_pipeline_ranks: int) -> list[Plan]:
    """Every partition level with every number of micro-batches."""
    levels = range(4) if num_replicas > 1 else range(1)
    return [
        plan_of(
            MODEL,
            (0, 1, 2, 3, 5) if num_pipeline_ranks == 2 else (0, 2, 3, 5),
            num_replicas=num_replicas,
            num_pipeline_ranks=num_pipeline_ranks,
            num_micro_batches=num_micro_batches,
            partition=level,
        )
        for level in levels
        for num_micro_batches in NUM_MICRO_BATCHES
    ]


def predicted(plan: Plan) -> list[dict[str, float]]:
    """By pipeline rank and opcode, from the simulator's own durations."""
    order = partial_order(plan)
    found: list[Counter[str]] = [Counter() for _ in plan.programs]
    works = Durations(plan=plan, cluster=plan.cluster).works(order)
    for cells, work in zip(order.members, works, strict=True):
        opcode = plan.programs[cells[0][0]][cells[0][1]].opcode
        senders = cells[:1] if opcode is Opcode.SEND else cells
        for rank, _ in senders:
            if num_bytes := sum(leg.num_bytes for leg in work.legs()):
                found[rank][opcode.value] += num_bytes  # type: ignore[assignment]
    return [dict(of_rank) for of_rank in found]


def check_job(made: list[Plan], folder: Path) -> None:
    """All plans in the same processes."""
    num_processes = made[0].world_size
    job = Job("count", made, folder, num_processes=num_processes, script="wire_ranks.py")
    found = job.results()
    of_state: dict[tuple[int, int, int], set[tuple[float, ...]]] = {}
    for place, plan in enumerate(made):
        wanted = predicted(plan)
        for world_rank, counts in enumerate(found):
            rank, _ = plan.coordinates(world_rank)
            assert counts[place] == wanted[rank], (plan.partition, plan.num_micro_batches, rank)
            sent = tuple(counts[place].get(kind, 0) for kind in OF_STATE)
            key = plan.num_replicas, plan.partition, world_rank
            of_state.setdefault(key, set()).add(sent)
    for key, sent_by_number in of_state.items():
        assert len(sent_by_number) == 1, (key, "the state's traffic depends on M")


def test_two_ranks_send_what_the_plan_says(tmp_path: Path) -> None:
    check_job([*plans(2, 1), *plans(1, 2)], tmp_path)


def test_groups_of_replicas_send_what_the_plan_says(tmp_path: Path) -> None:
    """Gathers inside groups of two; sums inside them, and over both groups."""
    made = [
        plan_of(
            MODEL,
            (0, 2, 3, 5),
            num_replicas=4,
            num_micro_batches=num_micro_batches,
            partition=level,
            partition_group_size=2,
        )
        for level in (1, 2, 3)
        for num_micro_batches in NUM_MICRO_BATCHES
    ]
    assert {plan.num_parts for plan in made} == {2}
    check_job(made, tmp_path)


@pytest.mark.slow
def test_four_ranks_send_what_the_plan_says(tmp_path: Path) -> None:
    check_job(plans(2, 2), tmp_path)


def test_every_kind_of_traffic_is_predicted() -> None:
    kinds = {
        (plan.num_replicas, plan.num_pipeline_ranks, plan.partition): set(predicted(plan)[0])
        for mesh in ((2, 1), (1, 2), (2, 2))
        for plan in plans(*mesh)
    }
    for (num_replicas, num_pipeline_ranks, partition), found in kinds.items():
        wanted = {"SEND", "REDUCE_TIED"} if num_pipeline_ranks > 1 else set()
        wanted |= {"REDUCE"} if num_replicas > 1 else set()
        wanted |= {"GATHER"} if partition else set()
        assert found == wanted


def test_one_rank_sends_nothing() -> None:
    for plan in plans(1, 1):
        assert predicted(plan) == [{}]
        opcodes = {instruction.opcode for instruction in plan.programs[0]}
        assert not opcodes & {Opcode.SEND, Opcode.RECEIVE, *OF_STATE}
