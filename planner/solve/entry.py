"""A choice on its way through the search, and the clock that all of them share."""

import dataclasses
import math
import time
from dataclasses import dataclass, field

from planner.solve.bounds import least_step_ticks
from planner.solve.choices import Choice
from planner.solve.instance import Instance, step_ticks
from planner.solve.memory import num_buffers
from planner.solve.types import Candidate, Placement

__all__ = [
    "Boundaries", "Clock", "Entry", "candidate_of", "make_entry", "placement_of", "shortlist",
]  # fmt: skip

Boundaries = tuple[int, ...]

MAX_SIMULATED = 8
MAX_OTHER_MESHES = 4
"""Simulated beside them: the best of each other mesh whose estimate is near."""
NEAR = 1.10
MAX_WHOLE_SEARCH = 800
"""Layers x stages up to which CP-SAT searches all splits."""


@dataclass(slots=True, kw_only=True)
class Clock:
    """Seconds of the search itself."""

    limit_seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def exclude(self, seconds: float) -> None:
        """Do not count so many of the seconds that have passed."""
        self.started += seconds

    @property
    def left(self) -> float:
        return self.limit_seconds - self.spent


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A choice on its way through the search."""

    instance: Instance
    bound_ticks: int
    verdict: str = ""
    boundaries: Boundaries | None = None
    """The best split known to fit."""
    score_seconds: float = math.inf
    """Of the most promising simple split: its step time, raised by the memory it lacks."""
    is_impossible: bool = False
    """It is proved that no split fits in memory."""
    step_seconds: float | None = None

    @property
    def mesh(self) -> tuple[int, int]:
        choice = self.instance.choice
        return choice.num_replicas, choice.num_pipeline_ranks

    @property
    def is_small(self) -> bool:
        """Whether CP-SAT searches all splits, so that its bound holds for all of them."""
        return self.instance.num_layers * self.instance.choice.num_stages <= MAX_WHOLE_SEARCH

    @property
    def bound_seconds(self) -> float:
        """No split is faster. Where the step-time model is slower than the simulator, as it may be
        with skip connections, its bound is lowered by as much.
        """
        seconds = self.bound_ticks * self.instance.tick_seconds
        if self.step_seconds is None:
            return seconds
        return seconds * min(1.0, self.step_seconds / self.objective_seconds)

    @property
    def objective_seconds(self) -> float:
        """Of the best split known; infinite without one."""
        if self.boundaries is None:
            return math.inf
        return step_ticks(self.instance, self.boundaries) * self.instance.tick_seconds


def make_entry(instance: Instance) -> Entry:
    """An entry of which nothing but its bound is known."""
    return Entry(instance=instance, bound_ticks=least_step_ticks(instance))


def shortlist(entries: list[Entry]) -> list[Entry]:
    """The best estimates, and the best of every other mesh that comes near."""
    ranked = sorted(
        (entry for entry in entries if entry.boundaries is not None),
        key=lambda entry: entry.objective_seconds,
    )
    chosen = ranked[:MAX_SIMULATED]
    meshes = {entry.mesh for entry in chosen}
    for entry in ranked[MAX_SIMULATED:]:
        near = entry.objective_seconds <= NEAR * ranked[0].objective_seconds
        if near and entry.mesh not in meshes and len(chosen) < MAX_SIMULATED + MAX_OTHER_MESHES:
            meshes.add(entry.mesh)
            chosen.append(entry)
    return chosen


def placement_of(choice: Choice, boundaries: Boundaries) -> Placement:
    """The placement of a choice and a split: stage s on pipeline rank s mod P."""
    return Placement(
        num_replicas=choice.num_replicas,
        num_pipeline_ranks=choice.num_pipeline_ranks,
        boundaries=boundaries,
        stage_ranks=tuple(stage % choice.num_pipeline_ranks for stage in range(choice.num_stages)),
        micro_batch_size=choice.micro_batch_size,
        num_micro_batches=choice.num_micro_batches,
        partition=choice.partition,
        recompute=(choice.recompute,) * choice.num_stages,
        num_weight_buffers=num_buffers(choice),
        num_gradient_buffers=num_buffers(choice),
    )


def candidate_of(entry: Entry) -> Candidate:
    """What became of the entry."""
    return Candidate(
        **dataclasses.asdict(entry.instance.choice),
        verdict=entry.verdict,
        bound_seconds=entry.bound_seconds,
        step_seconds=entry.step_seconds,
    )
