"""The families of plans that are in use, and the best plan of each for a problem.

A family is what a user of one method would choose from: one kind of parallelism, one schedule, one
way to keep state and activations. Everything else is free, so its best plan is the strongest that
the method has. This module knows the families. It does not know how a plan is found.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from planner.any_schedule import solve_any
from planner.errors import InfeasibleError, LgaError
from planner.explain.demands import meets
from planner.schedules import Schedule
from planner.solve import Constraints, Placement, Problem, Simulated
from planner.solve.choices import divisors

__all__ = ["FAMILIES", "Axis", "Family", "FamilyResult", "best_of_family", "contains"]

_NUMBERS = {2: "two", 4: "four"}
"""Of devices, in words."""


class Axis(StrEnum):
    """What the families of one group differ in."""

    PARALLELISM = "parallelism"
    SCHEDULE = "schedule"
    STATE = "state"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One way to train."""

    name: str
    axis: Axis
    schedule: Schedule | None = None
    """None: any."""
    constraints: Constraints = field(default_factory=Constraints)
    """What all its plans have in common, beside what the problem demands."""
    least_ranks: int = 1
    """Pipeline ranks of a replica, of every plan of it."""
    least_replicas: int = 1

    @property
    def least_devices(self) -> int:
        """Below which it has no plan."""
        return self.least_ranks * self.least_replicas

    @property
    def is_both(self) -> bool:
        """Several replicas and several pipeline ranks, of no particular number."""
        return self.least_ranks > 1 and self.least_replicas > 1


def _family(
    name: str,
    axis: Axis,
    schedule: Schedule | None = None,
    *,
    least_ranks: int = 1,
    least_replicas: int = 1,
    **common: Any,
) -> Family:
    return Family(
        name=name,
        axis=axis,
        schedule=schedule,
        constraints=Constraints(**common),
        least_ranks=least_ranks,
        least_replicas=least_replicas,
    )


FAMILIES: tuple[Family, ...] = (
    _family("data parallel only", Axis.PARALLELISM, num_pipeline_ranks=1, least_replicas=2),
    _family("pipeline only", Axis.PARALLELISM, num_replicas=1, least_ranks=2),
    _family("data and pipeline", Axis.PARALLELISM, least_replicas=2, least_ranks=2),
    _family("layered", Axis.SCHEDULE, Schedule.LAYERED),
    _family("plain accumulation", Axis.SCHEDULE, Schedule.PLAIN, num_pipeline_ranks=1),
    _family("GPipe", Axis.SCHEDULE, Schedule.GPIPE, stages_per_rank=1, least_ranks=2),
    _family("1F1B", Axis.SCHEDULE, Schedule.ONE_F_ONE_B, stages_per_rank=1, least_ranks=2),
    _family("interleaved", Axis.SCHEDULE, Schedule.INTERLEAVED, least_ranks=2),
    _family("hybrid", Axis.SCHEDULE, Schedule.HYBRID, least_ranks=2),
    _family(
        "zero bubble (ZB-H1)", Axis.SCHEDULE, Schedule.ZERO_BUBBLE, stages_per_rank=1, least_ranks=2
    ),
    _family("whole state", Axis.STATE, partition=0),
    _family("optimizer partitioned (1)", Axis.STATE, partition=1, least_replicas=2),
    _family("and gradients (2)", Axis.STATE, partition=2, least_replicas=2),
    _family("and weights (3)", Axis.STATE, partition=3, least_replicas=2),
    _family("no recompute", Axis.RECOMPUTE, recompute=False),
    _family("recompute all", Axis.RECOMPUTE, recompute=True),
    _family("no offload", Axis.OFFLOAD, offload_state=False, offload_inputs=False),
    _family("offload state", Axis.OFFLOAD, offload_state=True),
    _family("offload inputs", Axis.OFFLOAD, offload_inputs=True),
)
"""Those of an axis share nothing; those of several axes may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyResult:
    """The best plan of a family."""

    family: Family
    placement: Placement | None
    step_seconds: float | None
    """Simulated; None without a placement."""
    why_none: str = ""
    """Why there is no placement."""


def best_of_family(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    family: Family,
    *,
    time_limit_seconds: float = 5.0,
) -> FamilyResult:
    """The fastest plan of a family that fits in memory, by simulation.

    The problem is solved as it is itself, under the family's constraints. `simulate` is the
    problem's own; the limit is for the search, the simulations included.
    """
    if problem.num_devices < family.least_devices:
        why = f"needs {_NUMBERS[family.least_devices]} devices"
        return FamilyResult(family=family, placement=None, step_seconds=None, why_none=why)
    best: FamilyResult | None = None
    why = "no mesh has several replicas and several pipeline ranks" if family.is_both else ""
    try:
        parts = list(_narrowed(problem, family))
        for part in parts:
            limited = replace(part, time_limit_seconds=time_limit_seconds / max(1, len(parts)))
            found = _best(limited, simulate, family)
            if found.placement is None:
                why = found.why_none
            elif best is None or _seconds(found) < _seconds(best):
                best = found
    except LgaError as error:
        why = error.message
    if best is not None:
        return best
    return FamilyResult(family=family, placement=None, step_seconds=None, why_none=why)


def contains(family: Family, placement: Placement) -> bool:
    """Whether a placement is one of the family's plans."""
    return (
        family.schedule in (None, placement.schedule)
        and placement.num_replicas >= family.least_replicas
        and placement.num_pipeline_ranks >= family.least_ranks
        and meets(family.constraints, placement)
    )


def _seconds(result: FamilyResult) -> float:
    return math.inf if result.step_seconds is None else result.step_seconds


def _best(
    problem: Problem, simulate: Callable[[Placement], Simulated], family: Family
) -> FamilyResult:
    try:
        solution = solve_any(problem, simulate)
    except InfeasibleError as error:
        return FamilyResult(
            family=family, placement=None, step_seconds=None, why_none=error.message
        )
    return FamilyResult(
        family=family, placement=solution.placement, step_seconds=solution.step_seconds
    )


def _narrowed(problem: Problem, family: Family) -> Iterator[Problem]:
    """The problem under the family's constraints; several where they are no single setting.

    Raises:
        InfeasibleError: the problem demands what no plan of the family has.
    """
    wanted = problem.constraints
    changes: dict[str, Any] = {}
    common = replace(family.constraints, schedule=family.schedule)
    for name in Constraints.__dataclass_fields__:
        value, demanded = getattr(common, name), getattr(wanted, name)
        if value is None:
            continue
        if demanded not in (None, value):
            words = name.replace("_", " ")
            raise InfeasibleError(f"{words} {demanded} is demanded, this family has {value}")
        changes[name] = value
    constraints = replace(wanted, **changes)
    if not family.is_both:
        yield replace(problem, constraints=constraints)
        return
    for ranks in divisors(problem.num_devices)[1:-1]:
        if wanted.num_pipeline_ranks in (None, ranks):
            yield replace(problem, constraints=replace(constraints, num_pipeline_ranks=ranks))
