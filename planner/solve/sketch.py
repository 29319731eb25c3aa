"""A quick split of a choice: a few simple ones, with the recompute that each of them needs.

This module knows the Instance alone.
"""

import math

from planner.solve.bounds import least_step_ticks
from planner.solve.instance import Instance, step_ticks
from planner.solve.recompute import choose_recompute
from planner.solve.splits import balanced_split, fits, greedy_split, uniform_split
from planner.solve.staircase import climbs, few_courses, staircase
from planner.solve.types import Split

__all__ = ["sketch"]

CLOSE = 1.02
"""A split that is so near the bound need not be bettered at once."""
MIN_STAGES = 128
"""With fewer, a local search from a simple split does as well as a beam search."""
WIDTH = 100


def sketch(instance: Instance) -> Split | None:
    """The fastest of the simple splits that fit, by the step-time and memory models."""
    stages = instance.choice.num_stages
    found = {
        uniform_split(instance.num_layers, stages),
        greedy_split(instance.time, stages),
        balanced_split(instance.time, stages),
    }
    best = _fastest(instance, found)
    if stages >= MIN_STAGES and climbs(instance) and not _is_close(instance, best):
        beams = {staircase(instance, course, WIDTH) for course in few_courses()}
        best = _fastest(instance, beams, best)
    if best is None:
        tables = (instance.kept, instance.buffer)
        best = _fastest(instance, {balanced_split(table, stages) for table in tables})
    return best


def _is_close(instance: Instance, split: Split | None) -> bool:
    return split is not None and step_ticks(instance, split) < CLOSE * least_step_ticks(instance)


def _fastest(
    instance: Instance, splits: set[tuple[int, ...]], best: Split | None = None
) -> Split | None:
    """Of these and of the best one known, if it fits."""
    least = math.inf if best is None else step_ticks(instance, best)
    for boundaries in sorted(splits):
        split = choose_recompute(instance, boundaries)
        if fits(instance, split) and (ticks := step_ticks(instance, split)) < least:
            best, least = split, ticks
    return best
