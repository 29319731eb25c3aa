"""Whether anything fits: the first placement that does, by simulation, not the best.

Tries the choices that need least memory, with splits that need little. So a yes is certain and
costs little, and a no may be wrong where only an exact search would find the one split that fits.
"""

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from planner.errors import InfeasibleError, LgaError
from planner.explain.alternating import search_schedule
from planner.explain.types import limits_of
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Simulated
from planner.solve.bounds import least_rank_units
from planner.solve.build import Builder
from planner.solve.choices import check_problem, mesh_groups
from planner.solve.entry import Clock, placement_of
from planner.solve.infeasible import (
    MAX_TRIES,
    SEARCH_EFFORT,
    by_headroom,
    excess_bytes,
    lean_split,
    leaner,
    with_margin,
)
from planner.solve.instance import Instance
from planner.solve.sizes import Sizes
from planner.solve.splits import fits, warm_start
from planner.solve.types import Split

__all__ = ["first_fit"]

_MAX_GROUPS = 3
"""Numbers of devices that are tried, from all of them down."""
_LEAN = (Schedule.PLAIN, Schedule.ONE_F_ONE_B)
"""Schedules that hold the fewest micro-batches."""


def first_fit(
    problem: Problem, simulate: Callable[[Placement], Simulated], *, time_limit_seconds: float
) -> Placement | None:
    """A placement whose simulated peak is within every rank's limit, or None.

    None also where the demands contradict each other, or the model cannot be traced. Something is
    tried whatever the time limit, so that it is found without a limit of memory.
    """
    clock = Clock(limit_seconds=time_limit_seconds)
    demanded = problem.constraints.schedule
    try:
        if demanded in (None, Schedule.LAYERED):
            found = _layered(problem, simulate, clock)
            if found is not None:
                return found
        for schedule in _LEAN if demanded is None else (demanded,):
            has_time = clock.left > 0 or schedule is demanded
            if has_time and schedule is not Schedule.LAYERED:
                limited = replace(problem, time_limit_seconds=clock.left)
                with suppress(InfeasibleError):
                    return search_schedule(limited, simulate, schedule)[0]
    except LgaError:
        pass
    return None


def _layered(
    problem: Problem, simulate: Callable[[Placement], Simulated], clock: Clock
) -> Placement | None:
    sizes, builder = Sizes(problem=problem, clock=clock), Builder(problem=problem)
    num_layers = len(sizes.any_graph().layers)
    check_problem(problem, num_layers)
    groups = mesh_groups(problem, num_layers, accepts=sizes.accepts)
    tried = 0
    for _, choices in zip(range(_MAX_GROUPS), groups, strict=False):
        accepted = [choice for choice in choices if sizes.accepts(choice.micro_batch_size)]
        roomy = []
        for some in (leaner(problem, accepted), accepted):
            instances = map(builder.instance, some)
            possible = [i for i in instances if least_rank_units(i) <= max(i.limit_units)]
            roomy += by_headroom(possible)[:MAX_TRIES]
        for make, instance in itertools.product((lean_split, _searched_split), roomy):
            if tried and clock.left <= 0:
                return None
            tried += 1
            found = _fitting(problem, instance, make, simulate)
            if found is not None:
                return found
    return None


def _searched_split(instance: Instance) -> Split:
    return warm_start(instance, SEARCH_EFFORT)


def _fitting(
    problem: Problem,
    instance: Instance,
    make: Callable[[Instance], Split],
    simulate: Callable[[Placement], Simulated],
) -> Placement | None:
    """The instance's split; another one with room for what the simulator finds beyond the model."""
    for _ in range(2):
        split = make(instance)
        if not fits(instance, split):
            return None
        placement = placement_of(instance.choice, split)
        simulated = simulate(placement)
        if simulated.fits(limits_of(problem, placement)):
            return placement
        instance = with_margin(instance, excess_bytes(instance, split, simulated.peak_bytes))
    return None
