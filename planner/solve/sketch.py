"""A quick split of a choice: a few simple ones, with the recompute that each of them needs.

This module knows the Instance alone.
"""

import math

from planner.solve.instance import Instance, step_ticks
from planner.solve.recompute import choose_recompute
from planner.solve.splits import balanced_split, fits, greedy_split, uniform_split
from planner.solve.types import Split

__all__ = ["sketch"]


def sketch(instance: Instance) -> Split | None:
    """The fastest of the simple splits that fit, by the step-time and memory models."""
    stages = instance.choice.num_stages
    found = {
        uniform_split(instance.num_layers, stages),
        greedy_split(instance.time, stages),
        balanced_split(instance.time, stages),
    }
    best = _fastest(instance, found)
    if best is None:
        tables = (instance.kept, instance.buffer)
        best = _fastest(instance, {balanced_split(table, stages) for table in tables})
    return best


def _fastest(instance: Instance, splits: set[tuple[int, ...]]) -> Split | None:
    best, least = None, math.inf
    for boundaries in sorted(splits):
        split = choose_recompute(instance, boundaries)
        if fits(instance, split) and (ticks := step_ticks(instance, split)) < least:
            best, least = split, ticks
    return best
