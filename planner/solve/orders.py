"""Other orders of a branching model's layers, solved again with the winner's choices.

A chain of layers has one order. This module knows how a problem is asked of another order, and
which answer to keep. It does not know which orders there are, nor how a problem is solved.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from planner.cost import layer_seconds
from planner.errors import InfeasibleError
from planner.graph import LayerGraph, reordered
from planner.profile import Profile
from planner.schedules import Schedule
from planner.solve.dag_order import Order, exact_orders
from planner.solve.problem import Constraints, Problem, Simulated
from planner.solve.types import Placement, Solution

__all__ = ["best_order", "in_order"]

Simulate = Callable[[Placement], Simulated]
LEAST_SHARE = 1 / 8
"""Of the time limit, for all other orders together, where the first search has used it up."""


def in_order(problem: Problem, order: Order) -> Problem:
    """The same question of the same model with its layers in another order."""

    @cache
    def graph_at(micro_batch_size: int) -> LayerGraph:
        return reordered(problem.graph_at(micro_batch_size), order)

    @cache
    def profile_at(micro_batch_size: int) -> Profile:
        profile = problem.profile_at(micro_batch_size)
        return replace(profile, layers=tuple(profile.layers[layer] for layer in order))

    return replace(problem, graph_at=graph_at, profile_at=profile_at)


def best_order(
    problem: Problem,
    solution: Solution,
    solve: Callable[[Problem, Simulate], Solution],
    simulate_for: Callable[[Problem], Simulate],
) -> tuple[Problem, Solution]:
    """The problem and its solution, or those of another order whose simulated step is shorter.

    `solve` is asked for the choices that the solution has made, with the layers in other orders,
    under the solution's schedule and the layered one.
    """
    chosen = _as_chosen(problem.constraints, solution.placement)
    schedules = dict.fromkeys(
        (solution.placement.schedule, problem.constraints.schedule or Schedule.LAYERED)
    )
    asked = list(itertools.product(_orders(problem, solution.placement), schedules))
    left = problem.time_limit_seconds - solution.solve_seconds
    left = max(left, LEAST_SHARE * problem.time_limit_seconds)
    best, placement, step_seconds = problem, solution.placement, solution.step_seconds
    for order, schedule in asked:
        other = in_order(problem, order)
        question = replace(
            other,
            constraints=replace(chosen, schedule=schedule),
            time_limit_seconds=left / len(asked),
        )
        try:
            found = solve(question, simulate_for(other))
        except InfeasibleError:
            continue
        if found.step_seconds < step_seconds:
            best, placement, step_seconds = other, found.placement, found.step_seconds
    if best is problem:
        return problem, solution
    return best, replace(
        solution,
        placement=placement,
        step_seconds=step_seconds,
        bound_seconds=min(solution.bound_seconds, step_seconds),
        traced_order_seconds=solution.step_seconds,
    )


def _orders(problem: Problem, placement: Placement) -> tuple[Order, ...]:
    """None for a placement without a pipeline: there the order is no matter."""
    if placement.num_pipeline_ranks == 1:
        return ()
    size, cluster = placement.micro_batch_size, problem.cluster
    device = cluster.device(0)
    link = cluster.link(*(placement.grid.world_rank(rank, 0) for rank in (0, 1)))
    return exact_orders(
        problem.graph_at(size),
        [sum(layer_seconds(layer, device)) for layer in problem.profile_at(size).layers],
        link.bandwidth,
        min(placement.num_stages, len(problem.graph_at(size).layers)),
    )


def _as_chosen(constraints: Constraints, placement: Placement) -> Constraints:
    """As the winner has them, but for what goes with a split: stages, recomputing, offload."""
    within = constraints.partition_within
    return replace(
        constraints,
        partition_within=placement.num_parts if placement.partition and not within else within,
        num_replicas=placement.num_replicas,
        num_pipeline_ranks=placement.num_pipeline_ranks,
        micro_batch_size=placement.micro_batch_size,
        num_micro_batches=placement.num_micro_batches,
        partition=placement.partition if placement.num_replicas > 1 else None,
    )
