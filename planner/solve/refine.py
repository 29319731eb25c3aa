"""A better split of one choice, in so many seconds: a local search, then CP-SAT.

CP-SAT searches all splits where they are few, else a window around the best split known. This
module knows when which of them pays. It does not know other choices.
"""

import time

from planner.solve.model import solve_split
from planner.solve.splits import improve
from planner.solve.trial import Trial

__all__ = ["refine"]

MAX_WHOLE_SEARCH = 800
"""Layers x stages up to which CP-SAT searches all splits."""
MAX_STAGES = 256
"""With more, CP-SAT finds nothing in the time there is."""
WINDOW = 4
MAX_SPLIT_SECONDS = 4.0


def refine(trial: Trial, seconds: float, seed: int) -> None:
    """Improve the trial's split; raises its bound where all splits have been searched."""
    assert trial.split is not None
    instance = trial.instance
    started = time.monotonic()
    trial.offer(improve(instance, trial.split, max_evaluations=1500))
    left = seconds - (time.monotonic() - started)
    bound = trial.bound_seconds
    if left <= 0 or trial.objective_seconds <= bound or instance.choice.num_stages > MAX_STAGES:
        return
    is_whole = instance.num_layers * instance.choice.num_stages <= MAX_WHOLE_SEARCH
    answer = solve_split(
        instance,
        hint=trial.split,
        window=None if is_whole else WINDOW,
        time_limit_seconds=min(MAX_SPLIT_SECONDS, left),
        seed=seed,
    )
    trial.offer(answer.split)
    if is_whole and trial.split is not None:
        trial.bound_seconds = max(bound, answer.bound_ticks * instance.tick_seconds)
