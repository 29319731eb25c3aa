"""The fastest plan under any schedule: layered where memory is loose, others where it is short."""

from dataclasses import replace
from typing import Any

import pytest
from synthetic import chain_cluster, chain_graph, chain_profile

from planner import any_schedule
from planner.any_schedule import solve_any, with_bound
from planner.errors import InfeasibleError, UsageError
from planner.explain.families import FAMILIES, Axis, best_of_family
from planner.graph import LayerGraph
from planner.host_memory import simulated_of
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated

SAVED_BYTES = 1000


def question(memory_bytes: int, **demands: Any) -> Problem:
    """Eight layers on two ranks, eight micro-batches; a layer keeps SAVED_BYTES of each."""
    return Problem(
        graph_at=graph_at,
        profile_at=lambda size: chain_profile(graph_at(size), saved_bytes=SAVED_BYTES * size),
        cluster=chain_cluster(2, memory_bytes=memory_bytes),
        num_devices=2,
        global_batch_size=8,
        constraints=Constraints(
            num_replicas=1, num_pipeline_ranks=2, micro_batch_size=1, offload_inputs=False,
            offload_state=False, **demands,
        ),
        time_limit_seconds=1.5,
    )  # fmt: skip


def graph_at(size: int) -> LayerGraph:
    return chain_graph(8, micro_batch_size=size)


def simulator(problem: Problem) -> Any:
    def simulated(placement: Placement) -> Simulated:
        graph, profile = problem.graph_at(1), problem.profile_at(1)
        plan = lower(graph, profile, problem.cluster, placement, PlanOptions())
        return simulated_of(plan, simulate(plan))

    return simulated


def test_loose_memory_is_no_reason_to_leave_the_layered_order() -> None:
    problem = question(10**9)
    solution = solve_any(problem, simulator(problem))
    assert solution.placement.schedule is Schedule.LAYERED
    assert solution.layered_seconds is None
    assert with_bound(problem, solution) == solution  # its own is at least as good


def test_short_memory_is_one() -> None:
    """Layered, the activations of all micro-batches do not fit, so a rank recomputes; a rank that
    holds two of them at a time need not. No family's best plan is faster than the answer."""
    problem = question(4 * 4 * SAVED_BYTES)
    simulated = simulator(problem)
    solution = solve_any(problem, simulated)
    assert solution.placement.schedule is not Schedule.LAYERED
    assert solution.layered_seconds is not None
    assert solution.layered_seconds > solution.step_seconds
    assert simulated(solution.placement).step_seconds == solution.step_seconds
    assert solution.bound_seconds <= solution.objective_seconds
    for family in FAMILIES:
        if family.axis is Axis.SCHEDULE:
            found = best_of_family(problem, simulated, family, time_limit_seconds=0.2)
            assert found.step_seconds is None or found.step_seconds >= solution.step_seconds


def test_a_demanded_schedule_is_kept() -> None:
    problem = question(4 * 4 * SAVED_BYTES, schedule=Schedule.LAYERED)
    assert solve_any(problem, simulator(problem)).placement.schedule is Schedule.LAYERED
    problem = question(10**9, schedule=Schedule.GPIPE)
    solution = solve_any(problem, simulator(problem))
    assert solution.placement.schedule is Schedule.GPIPE
    assert solution.bound_seconds == 0
    bound = with_bound(problem, solution).any_order_seconds
    assert bound is not None
    assert 0.5 * solution.step_seconds < bound <= solution.step_seconds
    assert (with_bound(problem, solution, halves_backward=True).any_order_seconds or 0) < bound


def test_where_no_layered_plan_fits_another_may() -> None:
    memory_bytes = 4 * 4 * SAVED_BYTES
    problem = question(memory_bytes, recompute=False, schedule=Schedule.LAYERED)
    with pytest.raises(InfeasibleError):
        solve_any(problem, simulator(problem))
    problem = question(memory_bytes, recompute=False)
    assert solve_any(problem, simulator(problem)).placement.schedule is not Schedule.LAYERED
    problem = question(SAVED_BYTES, recompute=False)
    with pytest.raises(InfeasibleError):
        solve_any(problem, simulator(problem))


def test_another_is_searched_for_until_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no layered plan fits, whatever the layered search has left of the time."""
    for name, share in {"FIRST_SHARE": 0.0, "LAYERED_SHARE": 1.0, "MOVES_SHARE": 0.0}.items():
        monkeypatch.setattr(any_schedule, name, share)
    problem = question(4 * 4 * SAVED_BYTES, recompute=False)
    assert solve_any(problem, simulator(problem)).placement.schedule is not Schedule.LAYERED


@pytest.mark.parametrize("divides", [True, False])
def test_zero_bubble_is_searched_where_backward_can_be_divided(divides: bool) -> None:
    """With one stage per rank nothing else drains the pipeline as fast."""
    problem = question(10**9, stages_per_rank=1)
    problem = replace(
        problem, graph_at=lambda size: replace(graph_at(size), divides_backward=divides)
    )
    solution = solve_any(problem, simulator(problem))
    assert (solution.placement.schedule is Schedule.ZERO_BUBBLE) is divides
    bound = with_bound(problem, solution)
    assert (bound.any_order_seconds or bound.bound_seconds) <= solution.step_seconds


def test_offload_goes_with_the_layered_schedule_alone() -> None:
    problem = question(10**9, schedule=Schedule.GPIPE)
    demanded = Constraints(schedule=Schedule.GPIPE, offload_state=True)
    with pytest.raises(UsageError, match="offload state is demanded, and the gpipe schedule"):
        solve_any(replace(problem, constraints=demanded), simulator(problem))
