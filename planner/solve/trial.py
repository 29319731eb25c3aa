"""A choice that is tried: its split problem, the best split known, and what became of it."""

import dataclasses
import math
from dataclasses import dataclass, field

from planner.solve.entry import placement_of
from planner.solve.instance import Instance, step_ticks
from planner.solve.types import Candidate, Placement, Split

__all__ = ["Trial", "candidate_of"]


@dataclass(slots=True, kw_only=True, eq=False)
class Trial:
    """A choice on its way through the search."""

    instance: Instance
    bound_seconds: float
    """No placement of the choice is faster."""
    verdict: str = "estimated"
    split: Split | None = None
    """The best that fits, by the memory model."""
    objective_seconds: float = math.inf
    """Its step time, by the step-time model."""
    step_seconds: float | None = None
    """Its step time, by the simulator, where that finds that it fits."""
    seen: set[Split] = field(default_factory=set)
    """Splits that have been simulated."""

    @property
    def placement(self) -> Placement:
        assert self.split is not None
        return placement_of(self.instance.choice, self.split)

    def offer(self, split: Split | None) -> bool:
        """Take a split that fits, if it is faster than the one known."""
        if split is None:
            return False
        seconds = step_ticks(self.instance, split) * self.instance.tick_seconds
        if seconds >= self.objective_seconds:
            return False
        self.split, self.objective_seconds, self.step_seconds = split, seconds, None
        return True


def candidate_of(trial: Trial) -> Candidate:
    """What became of it, as the solution lists it."""
    return Candidate(
        **dataclasses.asdict(trial.instance.choice),
        verdict=trial.verdict,
        # Where the step-time model is slower than the simulator, so is its bound.
        bound_seconds=min(trial.bound_seconds, trial.step_seconds or math.inf),
        step_seconds=trial.step_seconds,
    )
