"""The fastest plan under any schedule, or under the one that is demanded.

The layered order holds every micro-batch's boundary tensors, so where memory is short it recomputes
what orders that hold fewer can keep. This module knows which schedules are asked and for how long.
It does not know how a placement is found under any of them.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from planner.errors import InfeasibleError, UsageError
from planner.explain.alternating import ScheduleSearch, search_schedule
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Progress, Simulated, Solution, solve
from planner.solve.any_order import any_order_seconds
from planner.solve.entry import Clock
from planner.solve.sizes import Sizes
from planner.variants import improved

__all__ = ["OTHER_SCHEDULES", "solve_any", "unbounded", "with_bound"]

OTHER_SCHEDULES = (
    Schedule.ONE_F_ONE_B,
    Schedule.PLAIN,
    Schedule.GPIPE,
    Schedule.INTERLEAVED,
    Schedule.ZERO_BUBBLE,
    Schedule.HYBRID,
)
FIRST_SHARE = 0.2
"""Of the time limit, for a first look at the other schedules."""
LAYERED_SHARE = 0.6
"""Of it, for the layered search at most; the other schedules together have what is left."""
MOVES_SHARE = 0.12
"""Of it, for single moves of the fastest of the others."""
MAY_LEAD = 1.1
"""What is so much slower than the layered plan may still become faster by single moves."""
VARIANTS_SHARE = 0.15
"""Of the time limit, for single changes of the winner."""
MAX_DEVICES = 256
"""Beyond it a search of all meshes for every schedule takes too long, and none is asked for."""

Simulate = Callable[[Placement], Simulated]


def solve_any(problem: Problem, simulate: Simulate, progress: Progress | None = None) -> Solution:
    """As `planner.solve.solve`, and where no schedule is demanded, of the fastest one.

    Where another schedule than the layered one wins, the objective and the bound are still those of
    layered plans. Where no layered plan fits, or another schedule is demanded, they have no bound.
    `with_bound` gives such answers the bound of every schedule.

    Raises as `solve` does, and UsageError if offload is demanded of another schedule.
    """
    demanded, started = problem.constraints.schedule, time.monotonic()
    if demanded is Schedule.LAYERED:
        return solve(problem, simulate, progress)
    if demanded is not None:
        placement, seconds = _under(problem, simulate, demanded)
        return unbounded(placement, seconds, time.monotonic() - started)
    if not _asks_others(problem):
        return solve(problem, simulate, progress)
    limit = problem.time_limit_seconds
    others = ScheduleSearch(problem=problem, simulate=simulate, schedules=_others(problem))
    try:
        with suppress(UsageError):  # of demands that the layered search refuses too
            others.advance(FIRST_SHARE * limit)
        rival = math.inf if others.best is None else others.best[1]
        layered = replace(problem, time_limit_seconds=LAYERED_SHARE * limit)
        solution = solve(layered, simulate, progress, rival_seconds=rival)
    except InfeasibleError:
        others.advance(limit, only_until_found=True)
        found = _fastest(others, limit)
        if found is None:
            raise
        clock = Clock(limit_seconds=VARIANTS_SHARE * limit)
        found = improved(problem, simulate, *found, clock)
        return unbounded(*found, time.monotonic() - started)
    except KeyboardInterrupt:
        if others.best is None:
            raise
        found_so_far = unbounded(*others.best, time.monotonic() - started)
        return replace(found_so_far, is_interrupted=True)
    if solution.is_interrupted:
        return solution
    known = solution.step_seconds
    found = _fastest(others, limit, solution.solve_seconds, known)
    if found is None or found[1] >= known:
        found = solution.placement, known
    clock = Clock(limit_seconds=VARIANTS_SHARE * limit)
    placement, seconds = improved(problem, simulate, *found, clock)
    if seconds >= known:
        return solution
    return replace(
        solution,
        placement=placement,
        step_seconds=seconds,
        layered_seconds=None if placement.schedule is Schedule.LAYERED else known,
    )


def with_bound(problem: Problem, solution: Solution, *, halves_backward: bool = False) -> Solution:
    """The solution with the bound of every schedule, unless it is a layered plan with its own.

    With `halves_backward` the bound covers orders that divide backward, as ZB-H1's; it does so
    anyway where ZB-H1 is demanded, or searched because no schedule is.
    """
    placement = solution.placement
    is_modular = solution.modular_seconds is None
    if placement.schedule is Schedule.LAYERED and is_modular and solution.bound_seconds:
        return solution
    demanded = problem.constraints.schedule
    divides = demanded is Schedule.ZERO_BUBBLE or (
        demanded is None and Schedule.ZERO_BUBBLE in _others(problem)
    )
    bound = any_order_seconds(
        problem,
        halves_backward=halves_backward or divides,
        profiled=(placement.micro_batch_size,),
    )
    return replace(solution, any_order_seconds=min(bound, solution.step_seconds))


def _under(problem: Problem, simulate: Simulate, schedule: Schedule) -> tuple[Placement, float]:
    wanted = problem.constraints
    for name in ("offload_state", "offload_inputs"):
        if getattr(wanted, name):
            raise UsageError(
                f"{name.replace('_', ' ')} is demanded, and the {schedule.value} schedule, for "
                "which offload is not planned",
                hint="the layered schedule, or no offload",
            )
    return search_schedule(problem, simulate, schedule)


def unbounded(placement: Placement, step_seconds: float, solve_seconds: float) -> Solution:
    """What was found without the solver's model: no bound of layered plans, no other candidates."""
    return Solution(
        placement=placement,
        step_seconds=step_seconds,
        objective_seconds=step_seconds,
        bound_seconds=0.0,
        solve_seconds=solve_seconds,
        uniform_seconds=None,
        greedy_seconds=None,
        candidates=(),
    )


def _asks_others(problem: Problem) -> bool:
    wanted = problem.constraints
    offloads = wanted.offload_state or wanted.offload_inputs
    return not offloads and problem.num_devices <= MAX_DEVICES


def _others(problem: Problem) -> tuple[Schedule, ...]:
    """Those that are searched: ZB-H1 where the model surely lets it divide backward."""
    sizes = Sizes(problem=problem, clock=Clock(limit_seconds=problem.time_limit_seconds))
    may_divide = sizes.any_graph().divides_backward
    return tuple(s for s in OTHER_SCHEDULES if may_divide or s is not Schedule.ZERO_BUBBLE)


def _fastest(
    others: ScheduleSearch,
    limit_seconds: float,
    layered_seconds: float = math.inf,
    known_seconds: float = math.inf,
) -> tuple[Placement, float] | None:
    """The fastest placement under any other schedule, after what the first look and the seconds of
    the layered search leave of the limit, or a share of it where that is more; None where none
    fits."""
    left = (1 - FIRST_SHARE - LAYERED_SHARE) * limit_seconds
    left = max(left, (1 - FIRST_SHARE) * limit_seconds - layered_seconds)
    clock = Clock(limit_seconds=left)
    others.advance(left - MOVES_SHARE * limit_seconds, faster_than=known_seconds)
    if others.best is not None and others.best[1] < known_seconds * MAY_LEAD:
        others.improve(clock.left)
    return others.best
