"""A placement and the best order of its compute, found together.

An order that holds fewer micro-batches at once makes room for other placements than the layered
order does. So the solver's placement competes with those that search for the interleaved orders
finds when list schedules judge them, in more memory than there is. This module knows whose
placements are asked for, and how the time is divided. It does not know how an order is found.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner.any_schedule import solve_any, unbounded
from planner.errors import InfeasibleError
from planner.explain.alternating import search_schedule
from planner.explain.types import limits_of
from planner.host_memory import simulated_of
from planner.order import MAX_LISTED, OrderFound, Planned, find_order, num_operations
from planner.schedules import OrderSearch, Schedule
from planner.solve import Placement, Problem, Progress, Simulated, Solution

__all__ = ["BestSchedule", "solve_with_order"]

SHARE_OF_PLACEMENTS, SHARE_OF_OTHERS, SHARE_OF_ORDERS = 1 / 2, 1 / 8, 1 / 4
"""Of the time limit: for the solver, for each search of other placements, and for orders at
least."""
ROOM = 4
"""How many times the memory there is, by the interleaved order's estimate, other placements may
need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSchedule:
    """A solution and its order."""

    solution: Solution
    """Its step is that of the order, which its placement does not name."""
    order: OrderFound


def solve_with_order(
    problem: Problem,
    planned: Planned,
    search: OrderSearch,
    progress: Progress | None = None,
) -> BestSchedule:
    """The placement and order whose simulated step is shortest.

    Where no placement has room for any order that can be found, the solver's reason is raised.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: nothing fits in memory.
    """
    limit, layered = problem.time_limit_seconds, search is OrderSearch.BEST_LAYERED
    ends = time.monotonic() + limit
    schedule = Schedule.LAYERED if layered else None
    asked = replace(
        problem,
        constraints=replace(problem.constraints, schedule=schedule),
        time_limit_seconds=SHARE_OF_PLACEMENTS * limit,
    )
    solution, reason = None, InfeasibleError("")
    try:
        solution = solve_any(asked, lambda place: simulated_of(*planned(place, None)), progress)
    except InfeasibleError as error:
        reason = error
    placements = [] if solution is None else [solution.placement]
    if not layered:
        seconds = SHARE_OF_OTHERS * limit
        placements += _others(replace(asked, time_limit_seconds=seconds), problem, planned)
    seconds = max(ends - time.monotonic(), SHARE_OF_ORDERS * limit)
    best = _best_order(placements, problem, planned, seconds, layered=layered)
    if best is None:
        raise reason
    return BestSchedule(solution=_answer(problem, solution, *best), order=best[0])


def _best_order(
    placements: Sequence[Placement],
    problem: Problem,
    planned: Planned,
    seconds: float,
    *,
    layered: bool,
) -> tuple[OrderFound, Placement] | None:
    """Without CP-SAT first; then with it where it can help, the most promising placement first."""

    def ask(placement: Placement, seconds: float) -> OrderFound | None:
        return find_order(
            planned,
            placement,
            limits_of(problem, placement),
            layered=layered,
            time_limit_seconds=seconds,
            seed=problem.seed,
        )

    quick = [(found, place) for place in placements if (found := ask(place, 0.0)) is not None]
    quick.sort(key=lambda pair: pair[0].step_seconds)
    best = quick[0] if quick else None
    for found, placement in quick:
        if best is not None and found.bound_seconds < best[0].step_seconds:
            began = time.monotonic()
            better = ask(placement, seconds / 2 if placement is not quick[-1][1] else seconds)
            seconds = max(0.0, seconds - (time.monotonic() - began))
            if better is not None and better.step_seconds <= best[0].step_seconds:
                best = better, placement
    return best


def _others(asked: Problem, problem: Problem, planned: Planned) -> Iterator[Placement]:
    """Placements of several stages per rank for which some list schedule fits in memory."""

    def judge(placement: Placement) -> Simulated:
        limits = limits_of(problem, placement)
        found = None
        if num_operations(placement) <= MAX_LISTED:
            found = find_order(planned, placement, limits, families=False, time_limit_seconds=0)
        if found is None:
            return Simulated(step_seconds=math.inf, peak_bytes=(sys.maxsize,) * len(limits))
        return simulated_of(found.best.plan, found.best.simulation)

    limit = asked.memory_limit_bytes
    if limit is None:
        devices = [host.device for host in asked.cluster.hosts]
        limit = min(device.usable_bytes for device in devices)
    roomy = replace(asked, memory_limit_bytes=ROOM * limit)
    for schedule in (Schedule.INTERLEAVED, Schedule.HYBRID):
        try:
            placement, _ = search_schedule(roomy, judge, schedule)
        except InfeasibleError:
            continue
        yield placement


def _answer(
    problem: Problem, solution: Solution | None, order: OrderFound, placement: Placement
) -> Solution:
    """The solver's answer with this placement and the step of its order."""
    is_known = solution is not None and placement == solution.placement
    placement = replace(placement, schedule=order.best.plan.schedule)
    if solution is None:
        return unbounded(placement, order.step_seconds, problem.time_limit_seconds)
    known = solution.layered_seconds
    if known is None and solution.placement.schedule is Schedule.LAYERED:
        known = solution.step_seconds
    if is_known and placement.schedule is Schedule.LAYERED:
        known = None
    return replace(
        solution, placement=placement, step_seconds=order.step_seconds, layered_seconds=known
    )
