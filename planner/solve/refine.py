"""A better split of one choice: a beam search, a local search, then CP-SAT.

CP-SAT searches all splits where they are few, else a window around the best split known. This
module knows when which of them pays. It does not know other choices.
"""

from planner.solve.instance import step_ticks
from planner.solve.model import solve_split
from planner.solve.recompute import choose_recompute
from planner.solve.splits import fits, improve
from planner.solve.staircase import all_courses, climbs, staircase
from planner.solve.trial import Trial

__all__ = ["refine"]

MAX_WHOLE_SEARCH = 800
"""Layers x stages up to which CP-SAT searches all splits."""
MAX_STAGES = 256
"""With more, CP-SAT finds nothing in the time there is."""
WINDOW = 4
MAX_SPLIT_SECONDS = 4.0
WIDTH = 50
MAX_EVALUATIONS = 1500


def refine(trial: Trial, seconds: float, seed: int) -> None:
    """Improve the trial's split; raises its bound where all splits have been searched.

    What it does follows from the seconds allowed, not from those that have passed, so that a busy
    machine gives the same answer, later.
    """
    assert trial.split is not None
    instance, bound = trial.instance, trial.bound_seconds
    is_whole = instance.num_layers * instance.choice.num_stages <= MAX_WHOLE_SEARCH
    trial.offer(improve(instance, trial.split, MAX_EVALUATIONS))
    if not is_whole and climbs(instance) and trial.objective_seconds > bound:
        _climb(trial)
    if trial.objective_seconds <= bound or instance.choice.num_stages > MAX_STAGES:
        return
    answer = solve_split(
        instance,
        hint=trial.split,
        window=None if is_whole else WINDOW,
        time_limit_seconds=min(MAX_SPLIT_SECONDS, seconds),
        seed=seed,
    )
    trial.offer(answer.split)
    if is_whole and trial.split is not None:
        trial.bound_seconds = max(bound, answer.bound_ticks * instance.tick_seconds)


def _climb(trial: Trial) -> None:
    """Beam searches along many courses, and a local search from the best that they find."""
    instance = trial.instance
    found = {staircase(instance, course, WIDTH) for course in all_courses()}
    splits = [choose_recompute(instance, boundaries) for boundaries in sorted(found)]
    fitting = [split for split in splits if fits(instance, split)]
    if fitting:
        best = min(fitting, key=lambda split: step_ticks(instance, split))
        trial.offer(improve(instance, best, MAX_EVALUATIONS))
