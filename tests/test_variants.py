"""Single changes of a placement: the simulator's word on each, and no demand broken."""

from dataclasses import replace
from typing import Any

import pytest
from test_any_schedule import question, simulator

from planner.schedules import Schedule
from planner.solve import Placement, Problem
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.entry import Clock
from planner.solve.instance import step_ticks
from planner.solve.types import Split
from planner.variants import MAX_ROUNDS, improved

POOR = Placement(
    num_replicas=1, num_pipeline_ranks=2, boundaries=(0, 2, 4, 6, 8), stage_ranks=(0, 1, 0, 1),
    micro_batch_size=1, num_micro_batches=8, partition=0, recompute=(True,) * 4,
    num_weight_buffers=1, num_gradient_buffers=1, schedule=Schedule.HYBRID, group_size=8,
)  # fmt: skip


def best_of(problem: Problem, placement: Placement, seconds: float = 60.0) -> Placement:
    simulate = simulator(problem)
    before = simulate(placement).step_seconds
    found, after = improved(problem, simulate, placement, before, Clock(limit_seconds=seconds))
    assert after == simulate(found).step_seconds
    assert after <= before
    return found


def test_what_is_not_needed_goes() -> None:
    found = best_of(question(10**9), POOR)
    assert not any(found.recompute)
    simulate = simulator(question(10**9))
    layered = replace(POOR, schedule=Schedule.LAYERED, group_size=0, recompute=(False,) * 4)
    assert simulate(found).step_seconds <= simulate(layered).step_seconds


@pytest.mark.parametrize(
    "demands", [{"recompute": True}, {"schedule": Schedule.HYBRID}, {"num_buffers": 1}]
)
def test_demands_are_met(demands: dict[str, Any]) -> None:
    found = best_of(question(10**9, **demands), POOR)
    wanted = question(10**9, **demands).constraints
    assert wanted.recompute is None or all(found.recompute)
    assert wanted.schedule in (None, found.schedule)
    assert wanted.num_buffers in (None, found.num_weight_buffers)


def test_what_does_not_fit_is_left() -> None:
    roomy = best_of(question(10**9), POOR)
    peak = max(simulator(question(10**9))(roomy).peak_bytes)
    tight = question(peak - 1)
    assert max(simulator(tight)(best_of(tight, POOR)).peak_bytes) < peak


def test_without_time_nothing_changes() -> None:
    assert best_of(question(10**9), POOR, seconds=0.0) == POOR


def test_one_rank() -> None:
    one = replace(
        POOR, num_pipeline_ranks=1, stage_ranks=(0,) * 4, schedule=Schedule.PLAIN, group_size=0
    )
    problem = replace(question(10**9), constraints=replace(question(1).constraints,
                      num_pipeline_ranks=1))  # fmt: skip
    found = best_of(problem, one)
    assert found.num_pipeline_ranks == 1
    assert not any(found.recompute)


def test_the_step_time_model_counts_what_a_split_recomputes() -> None:
    """Also where the choice asks for none: other searches set the flags by themselves."""
    choice = Choice(
        num_replicas=1, num_pipeline_ranks=2, stages_per_rank=2, micro_batch_size=1,
        num_micro_batches=8, partition=0, recompute=False,
    )  # fmt: skip
    builder = Builder(problem=question(10**9))
    none, free = (
        builder.instance(replace(choice, recompute=recompute)) for recompute in (False, None)
    )
    for flags in ((False,) * 4, (True, False, True, False), (True,) * 4):
        split = Split(boundaries=POOR.boundaries, recompute=flags)
        seconds = step_ticks(none, split) * none.tick_seconds
        assert seconds == pytest.approx(step_ticks(free, split) * free.tick_seconds)
    assert step_ticks(none, Split(boundaries=POOR.boundaries, recompute=(True,) * 4)) > step_ticks(
        none, Split(boundaries=POOR.boundaries, recompute=(False,) * 4)
    )


@pytest.mark.parametrize("num_stages", [1, 2, 3, 8])
def test_outermost_stages_of_one_rank_are_merged(num_stages: int) -> None:
    """A slow device pays for every instruction, so that fewer stages are faster."""
    problem = question(10**9)
    host = problem.cluster.hosts[0]
    slow = replace(host, device=replace(host.device, instruction_overhead_seconds=0.5))
    problem = replace(
        problem,
        cluster=replace(problem.cluster, hosts=(slow,)),
        constraints=replace(problem.constraints, num_pipeline_ranks=1),
    )
    start = replace(
        POOR, num_pipeline_ranks=1, boundaries=(*range(num_stages), 8),
        stage_ranks=(0,) * num_stages, recompute=(False,) * num_stages,
        schedule=Schedule.LAYERED, group_size=0,
    )  # fmt: skip
    found = best_of(problem, start)
    assert found.num_stages == max(1, num_stages - MAX_ROUNDS)
