"""The bound of every schedule, against the simulated step of plans of every schedule."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from exhaustive import random_problem

from planner.lower import lower
from planner.order import find_order
from planner.order.families import family_orders
from planner.plan.types import Plan, PlanOptions
from planner.schedule import Order
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve import Placement, Problem
from planner.solve.any_order import any_order_seconds

CLOSE = 1 - 1e-6
"""Counts are whole numbers, so a line through two of them may lie a little above a third."""
OTHERS = set(Schedule) - {Schedule.LAYERED, Schedule.GPIPE, Schedule.FORWARD, Schedule.CUSTOM}
"""GPipe is the layered order of one stage per rank."""


def check_bounds(seed: int, max_placements: int) -> Counter[Schedule]:
    """No order of any placement is simulated to take less than the bounds; how many were tried."""
    small = random_problem(seed, max_placements=max_placements)
    problem, found = small.problem, Counter[Schedule]()
    options = PlanOptions(
        optimizer_slots=problem.optimizer_slots, check_finite=problem.updates_wait
    )

    def planned(placement: Placement, order: Order | None) -> tuple[Plan, Simulation]:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        plan = lower(graph, profile, problem.cluster, placement, options, order)
        return plan, simulate(plan)

    bounds = {
        halves: any_order_seconds(problem, halves_backward=halves) for halves in (False, True)
    }
    assert bounds[True] <= bounds[False]
    chosen = random.Random(seed).sample(list(small.simulated), min(4, len(small.simulated)))
    for placement in chosen:
        mesh = narrowed(problem, placement)
        own = {halves: any_order_seconds(mesh, halves_backward=halves) for halves in bounds}
        simulated = [
            (each.schedule, planned(each, order)[1].step_seconds)
            for each, order in family_orders(placement)
        ]
        limits = (2**62,) * placement.num_pipeline_ranks
        listed = find_order(planned, placement, limits, families=False, time_limit_seconds=0)
        if listed is not None:
            simulated += [(Schedule.CUSTOM, t.simulation.step_seconds) for t in listed.tried]
        for schedule, seconds in simulated:
            halves = schedule is Schedule.ZERO_BUBBLE
            assert bounds[halves] * CLOSE <= own[halves]
            assert own[halves] * CLOSE <= seconds, (schedule, placement)
            found[schedule] += 1
    return found


def narrowed(problem: Problem, placement: Placement) -> Problem:
    """The problem with the placement's mesh and batching alone."""
    wanted = replace(
        problem.constraints,
        num_replicas=placement.num_replicas,
        num_pipeline_ranks=placement.num_pipeline_ranks,
        micro_batch_size=placement.micro_batch_size,
        num_micro_batches=placement.num_micro_batches,
        partition=placement.partition if placement.num_replicas > 1 else None,
    )
    return replace(problem, constraints=wanted)


def test_no_plan_of_any_schedule_undercuts_its_bound() -> None:
    found = sum((check_bounds(seed, 100) for seed in range(30)), Counter[Schedule]())
    assert all(found[schedule] >= 3 for schedule in OTHERS), found
    assert found[Schedule.CUSTOM] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_no_plan_of_any_schedule_undercuts_its_bound_anywhere(seed: int) -> None:
    check_bounds(seed, 1000)
