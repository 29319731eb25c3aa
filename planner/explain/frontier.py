"""Frontiers: step time against memory per device, and against the number of devices.

Every point is a plan, solved under a limit of its own and simulated. This module knows which limits
are worth a try. It does not know how points are drawn.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.any_schedule import solve_any
from planner.errors import LgaError
from planner.explain.types import PlannerFor, Tell, simulator, tell_nobody
from planner.solve import Placement, Problem
from planner.solve.choices import divisors

__all__ = ["Point", "efficient", "time_and_devices", "time_and_memory"]

_MAX_DEVICE_COUNTS = 10
_STEPS_DOWN = 0.8
"""Each memory limit over the peak of the plan before, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan of a frontier."""

    placement: Placement
    step_seconds: float
    peak_bytes: int
    """Of the rank that needs most."""

    @property
    def num_devices(self) -> int:
        return self.placement.world_size


def time_and_memory(
    problem: Problem,
    planner_for: PlannerFor,
    *,
    num_points: int = 10,
    time_limit_seconds: float = 2.0,
    tell: Tell = tell_nobody,
) -> tuple[Point, ...]:
    """Plans for less and less memory per device, the largest first, none beaten in both by another.

    The first is the problem's own; the last is the smallest that was found to fit.
    """
    found: list[Point] = []
    limit: int | None = problem.memory_limit_bytes
    for number in range(num_points):
        words = "as it is" if limit is None else f"{limit / 1e9:.3g} GB per device"
        tell(f"memory {number + 1} of at most {num_points}: {words}")
        point = _solved(
            replace(problem, memory_limit_bytes=limit, time_limit_seconds=time_limit_seconds),
            planner_for,
        )
        if point is None:
            if not found or number + 1 == num_points:
                break
            # Between the last that fits and this one.
            limit = ((limit or 0) + found[-1].peak_bytes) // 2
            if limit > 0.97 * found[-1].peak_bytes:
                break
            continue
        found.append(point)
        limit = math.floor(point.peak_bytes * _STEPS_DOWN)
        if limit < 1:
            break
    return efficient(found)


def time_and_devices(
    problem: Problem,
    planner_for: PlannerFor,
    *,
    time_limit_seconds: float = 2.0,
    tell: Tell = tell_nobody,
) -> tuple[Point, ...]:
    """The best plan on the first 1, 2, ... devices of the cluster, the most devices first; numbers
    on which nothing fits are left out."""
    found = []
    for number in _device_counts(problem.num_devices):
        tell(f"on {number} devices")
        point = _solved(
            replace(problem, num_devices=number, time_limit_seconds=time_limit_seconds),
            planner_for,
        )
        if point is not None:
            found.append(point)
    return _fastest_of_each_number(found)


def efficient(points: Iterable[Point]) -> tuple[Point, ...]:
    """Without those that another one beats in time and memory, the largest peak first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.step_seconds, point.peak_bytes)):
        if not kept or point.peak_bytes < kept[-1].peak_bytes:
            kept.append(point)
    return tuple(kept)


def _solved(problem: Problem, planner_for: PlannerFor) -> Point | None:
    simulate = simulator(planner_for(problem))
    try:
        solution = solve_any(problem, simulate)
    except LgaError:
        return None
    simulated = simulate(solution.placement)
    return Point(
        placement=solution.placement,
        step_seconds=simulated.step_seconds,
        peak_bytes=max(simulated.peak_bytes),
    )


def _device_counts(most: int) -> list[int]:
    """All divisors of the number of devices, or as many of them, evenly spread."""
    counts = divisors(most)[::-1]
    if len(counts) <= _MAX_DEVICE_COUNTS:
        return counts
    step = (len(counts) - 1) / (_MAX_DEVICE_COUNTS - 1)
    return [counts[round(step * index)] for index in range(_MAX_DEVICE_COUNTS)]


def _fastest_of_each_number(points: Iterable[Point]) -> tuple[Point, ...]:
    best: dict[int, Point] = {}
    for point in points:
        known = best.get(point.num_devices)
        if known is None or point.step_seconds < known.step_seconds:
            best[point.num_devices] = point
    return tuple(best[number] for number in sorted(best, reverse=True))
