"""The whole way from a model file to a proved plan: prepare, solve, lower, simulate, check.

This module knows the order of the levels. It does not know what any level does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from planner.any_schedule import solve_any, unbounded, with_bound
from planner.apply_profile import AppliedProfile
from planner.best_schedule import solve_with_order
from planner.check import Report, check
from planner.cluster import Cluster
from planner.errors import CheckError, InfeasibleError
from planner.explain.changes import ClusterAt
from planner.explain.fit import first_fit
from planner.explain.remedies import with_remedies
from planner.explain.types import simulator
from planner.graph import LayerGraph
from planner.measure.measured import MeasuredModel
from planner.model_file import ModelFile
from planner.order import OrderFound
from planner.plan.types import Plan, Prediction
from planner.precision import Precision
from planner.prepare import Prepared, prepare
from planner.schedules import OrderSearch
from planner.simulate import Simulation
from planner.solve import (
    Constraints,
    Placement,
    Problem,
    Progress,
    Simulated,
    Solution,
    best_order,
)

__all__ = ["PlanResult", "find_plan", "make_plan"]

LAST_SHARE = 1 / 4
"""Of the time limit, for a plan that the search has missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A plan, and what was learnt on the way to it."""

    plan: Plan
    graph: LayerGraph
    solution: Solution
    simulation: Simulation
    report: Report
    prepared: Prepared
    """The question that the plan answers."""
    order: OrderFound | None = None
    """Where orders were searched beside those of the families."""

    @property
    def measured(self) -> AppliedProfile | None:
        """Where the seconds of layers were measured."""
        return self.prepared.measured


def make_plan(
    model_file: ModelFile,
    *,
    num_devices: int,
    cluster: Cluster,
    global_batch_size: int | None = None,
    constraints: Constraints | None = None,
    measured: MeasuredModel | None = None,
    memory_limit_bytes: int | None = None,
    clip_norm: float | None = None,
    clip_delayed: bool = False,
    check_finite: bool = False,
    save: bool = False,
    update_on_host: bool = False,
    precision: Precision = Precision.MODEL,
    keep_float32: Sequence[str] = (),
    time_limit_seconds: float = 20.0,
    seed: int = 0,
    order: OrderSearch | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Plan a model for the first `num_devices` devices of a cluster: `prepare`, then `find_plan`.

    With `order` the order of compute need not be that of a family.

    Raises what those raise.
    """
    prepared = prepare(
        model_file,
        num_devices=num_devices,
        cluster=cluster,
        global_batch_size=global_batch_size,
        constraints=constraints,
        measured=measured,
        memory_limit_bytes=memory_limit_bytes,
        clip_norm=clip_norm,
        clip_delayed=clip_delayed,
        check_finite=check_finite,
        save=save,
        update_on_host=update_on_host,
        precision=precision,
        keep_float32=keep_float32,
        time_limit_seconds=time_limit_seconds,
        seed=seed,
    )
    return find_plan(prepared.with_order(order), progress)


def find_plan(
    prepared: Prepared,
    progress: Progress | None = None,
    *,
    advise: bool = True,
    cluster_at: ClusterAt | None = None,
) -> PlanResult:
    """Solve, lower and simulate, and prove the winner's plan. `progress` hears of the search.

    Where nothing fits, `advise` searches as long again for changes under which something would;
    more devices come from `cluster_at`, else from more hosts like the largest.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        TraceError: no micro-batch size can be traced, or not the one demanded.
        InfeasibleError: no plan fits in memory.
        CheckError: the plan made breaks a rule: a defect of this program.
    """
    lowered, problem = cache(prepared.lowered), prepared.problem
    searched = None
    try:
        if prepared.order is not None:
            searched = solve_with_order(problem, lowered, prepared.order, progress)
            solution = searched.solution
        else:
            solution = solve_any(problem, simulator(lowered), progress)
    except InfeasibleError as error:
        if not advise:
            raise
        solution = _found_after_all(prepared, simulator(lowered), error, cluster_at)
    if not prepared.foresees(solution.placement.micro_batch_size):
        assert prepared.traced is not None
        return find_plan(prepared.traced, progress, advise=advise, cluster_at=cluster_at)
    if searched is not None:
        plan, simulation = searched.order.best.plan, searched.order.best.simulation
    else:
        if not solution.is_interrupted:
            problem, solution = best_order(
                problem, solution, solve_any, lambda other: simulator(prepared.planner_for(other))
            )
        if problem is not prepared.problem:
            prepared = replace(prepared, problem=problem)
            lowered = cache(prepared.lowered)
        plan, simulation = lowered(solution.placement)
    halves = prepared.order is OrderSearch.BEST
    solution = with_bound(problem, solution, halves_backward=halves)
    bound = solution.any_order_seconds or solution.bound_seconds
    plan = replace(plan, prediction=_prediction(prepared, plan, simulation, bound))
    return PlanResult(
        plan=plan,
        graph=prepared.problem.graph_at(plan.micro_batch_size),
        solution=solution,
        simulation=simulation,
        report=_proved(plan),
        prepared=prepared,
        order=None if searched is None else searched.order,
    )


def _found_after_all(
    prepared: Prepared,
    simulate: Callable[[Placement], Simulated],
    error: InfeasibleError,
    cluster_at: ClusterAt | None,
) -> Solution:
    """Any plan that the search has missed; raises the error with remedies where there is none."""
    problem = prepared.problem
    found = None if prepared.order is not None else _any_fit(problem, simulate)
    if found is None:
        raise with_remedies(
            error,
            problem,
            prepared.planner_for,
            cluster_at=cluster_at,
            time_limit_seconds=problem.time_limit_seconds,
        ) from None
    return found


def _any_fit(problem: Problem, simulate: Callable[[Placement], Simulated]) -> Solution | None:
    """Where a search has found nothing: any plan at all, so that advice is given only where one
    is needed."""
    limit = LAST_SHARE * problem.time_limit_seconds
    placement = first_fit(problem, simulate, time_limit_seconds=limit)
    if placement is None:
        return None
    spent = (1 + LAST_SHARE) * problem.time_limit_seconds
    return unbounded(placement, simulate(placement).step_seconds, spent)


def _prediction(
    prepared: Prepared, plan: Plan, simulation: Simulation, bound_seconds: float
) -> Prediction:
    cluster, limit = prepared.problem.cluster, prepared.problem.memory_limit_bytes
    limits = tuple(
        min(cluster.device(place).usable_bytes for place in plan.grid.replicas_of(rank))
        if limit is None
        else limit
        for rank in range(plan.num_pipeline_ranks)
    )
    layers = "from the roofline"
    if prepared.measured is not None:
        layers = prepared.measured.note_at(plan.micro_batch_size)
    return Prediction(
        step_seconds=simulation.step_seconds,
        bubble=simulation.bubble,
        peak_bytes=simulation.peak_bytes,
        memory_limit_bytes=min(limits),
        rank_limit_bytes=limits if len(set(limits)) > 1 else (),
        provenance=f"simulated on {cluster.name} ({cluster.provenance}); layers {layers}",
        bound_seconds=bound_seconds or None,
    )


def _proved(plan: Plan) -> Report:
    report = check(plan)
    for failure in report.failures:
        raise CheckError(
            f"the plan made breaks rule {failure.number} ({failure.title}):\n"
            f"{failure.counterexample}",
            hint="this is a defect of lga-plan: please report it with the model",
        )
    return report
