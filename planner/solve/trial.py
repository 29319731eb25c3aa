"""A choice that is tried: its split problem, the best split known, and what became of it."""

import dataclasses
import math
from dataclasses import dataclass

from planner.solve.entry import placement_of
from planner.solve.instance import Instance, step_ticks
from planner.solve.types import Candidate, Placement, Split

__all__ = ["Best", "Trial", "candidate_of"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The fastest placement simulated, whatever becomes of its trial."""

    trial: Trial
    instance: Instance
    split: Split
    objective_seconds: float
    step_seconds: float

    @classmethod
    def of(cls, trial: Trial) -> "Best":
        """A trial whose split has just been simulated."""
        assert trial.split is not None
        assert trial.step_seconds is not None
        return cls(
            trial=trial,
            instance=trial.instance,
            split=trial.split,
            objective_seconds=trial.objective_seconds,
            step_seconds=trial.step_seconds,
        )

    @property
    def placement(self) -> Placement:
        return placement_of(self.instance.choice, self.split)

    def candidate(self) -> Candidate:
        """As the solution lists it."""
        return dataclasses.replace(
            candidate_of(self.trial), verdict="best", step_seconds=self.step_seconds
        )


def candidate_of(trial: Trial) -> Candidate:
    """What became of it, as the solution lists it."""
    return Candidate(
        **dataclasses.asdict(trial.instance.choice),
        verdict=trial.verdict,
        # Where the step-time model is slower than the simulator, so is its bound.
        bound_seconds=min(trial.bound_seconds, trial.step_seconds or math.inf),
        step_seconds=trial.step_seconds,
    )
