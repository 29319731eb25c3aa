"""A local search that starts again from near its best: past splits that no single move improves.

Where ranks are unequal (a heavy last layer, memory for a few recomputed stages), a better split is
often several moves away, each of which is worse alone. This module knows one trial at a time.
"""

import random

from planner.solve.instance import step_ticks
from planner.solve.splits import fits, improve
from planner.solve.trial import Trial
from planner.solve.types import Split

__all__ = ["search_nearby", "shake"]

MAX_EVALUATIONS = 1500
"""Of a local search."""
MAX_MOVES = 5


def search_nearby(trial: Trial) -> None:
    """A local search from the trial's split, if it has one."""
    if trial.split is not None:
        trial.offer(improve(trial.instance, trial.split, MAX_EVALUATIONS))


def shake(trial: Trial, generator: random.Random) -> None:
    """A few moves at random from the trial's split, and a local search from there."""
    if trial.split is None or trial.instance.choice.num_stages == 1:
        return
    split = trial.split
    for _ in range(generator.randint(2, MAX_MOVES)):
        split = _moved(split, generator, may_flip=trial.instance.choice.recompute is None)
    found = improve(trial.instance, split, MAX_EVALUATIONS)
    ticks = step_ticks(trial.instance, found)
    if ticks * trial.instance.tick_seconds < trial.objective_seconds and fits(
        trial.instance, found
    ):
        trial.offer(found)


def _moved(split: Split, generator: random.Random, *, may_flip: bool) -> Split:
    """With a layer moved from one stage to another, those between shifted, or one stage's
    recompute changed."""
    num_stages = len(split.recompute)
    if may_flip and generator.random() < 1 / 3:
        flags = list(split.recompute)
        stage = generator.randrange(num_stages)
        flags[stage] = not flags[stage]
        return Split(boundaries=split.boundaries, recompute=tuple(flags))
    first, last = sorted(generator.sample(range(num_stages), 2))
    shift = generator.choice((-1, 1))
    boundaries = tuple(
        cut + shift * (first < place <= last) for place, cut in enumerate(split.boundaries)
    )
    smaller = first if shift < 0 else last
    if boundaries[smaller + 1] <= boundaries[smaller]:
        return split  # it has but one layer to give
    return Split(boundaries=boundaries, recompute=split.recompute)
