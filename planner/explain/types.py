"""What the explanations pass around: planners of changed problems, and what they found."""

from collections.abc import Callable
from dataclasses import dataclass

from planner.host_memory import simulated_of
from planner.plan.types import Plan
from planner.simulate import Simulation
from planner.solve import Placement, Problem, Simulated

__all__ = ["Planned", "PlannerFor", "Resolved", "Tell", "limits_of", "simulator", "tell_nobody"]

Planned = Callable[[Placement], tuple[Plan, Simulation]]
"""Lowers and simulates a placement; the caller caches."""
PlannerFor = Callable[[Problem], Planned]
"""Of a problem that may differ in anything but the model."""
Tell = Callable[[str], None]
"""Takes a word on what is being solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The answer to a changed problem."""

    words: str
    """What was changed."""
    problem: Problem
    placement: Placement | None
    step_seconds: float | None
    """Simulated; None without a placement."""
    peak_bytes: tuple[int, ...] = ()
    """Per pipeline rank."""
    why_none: str = ""
    """Why there is no placement."""


def simulator(planned: Planned) -> Callable[[Placement], Simulated]:
    """What the solver asks for, from what makes whole plans."""

    def simulated(placement: Placement) -> Simulated:
        return simulated_of(*planned(placement))

    return simulated


def limits_of(problem: Problem, placement: Placement) -> tuple[int, ...]:
    """Bytes that each pipeline rank may use: of the smallest of its replicas' devices."""
    if problem.memory_limit_bytes is not None:
        return (problem.memory_limit_bytes,) * placement.num_pipeline_ranks
    found = []
    for rank in range(placement.num_pipeline_ranks):
        devices = map(problem.cluster.device, placement.grid.replicas_of(rank))
        found.append(min(device.usable_bytes for device in devices))
    return tuple(found)


def tell_nobody(_: str) -> None:
    """A `Tell` for callers who show no progress."""
