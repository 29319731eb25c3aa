"""Splits without CP-SAT: the two simple ones, a dynamic programme, and a local search.

They give CP-SAT its hint, and the baselines that the answer is compared with. This module knows
the Instance alone.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from planner.solve.instance import (
    Cuts,
    Flags,
    Instance,
    overflow_units,
    rank_units_of_many,
    step_ticks_of_many,
)
from planner.solve.recompute import choose_recompute
from planner.solve.types import Split

__all__ = [
    "Key", "arrays", "balanced_split", "balanced_stages", "fits", "greedy_split", "improve",
    "keys_of_figures", "largest_stage", "neighbours", "uniform_split", "warm_start",
]  # fmt: skip

Key = tuple[float, ...]

# Moves over a distance need one boundary list per pair of stages: only where that is few.
MAX_STAGES_FOR_DISTANT_MOVES = 24
# With more stages, a round of the local search takes long and changes next to nothing.
MAX_STAGES_TO_IMPROVE = 256


def uniform_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Equal numbers of layers, the remainder spread."""
    return tuple(num_layers * stage // num_stages for stage in range(num_stages + 1))


def greedy_split(prefix: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Fill each stage until it has reached the mean of what is left, then go on to the next."""
    num_layers = len(prefix) - 1
    boundaries = [0]
    for stage in range(num_stages - 1):
        first, left = boundaries[-1], num_stages - stage
        target = prefix[first] + (prefix[-1] - prefix[first]) / left
        last_allowed = num_layers - (left - 1)
        end = first + 1
        while end < last_allowed and prefix[end] < target:
            end += 1
        boundaries.append(end)
    return (*boundaries, num_layers)


def balanced_split(prefix: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """A split whose largest stage is as small as any split's: the least size is found by halving,
    and stages are filled up to it, leaving a layer to each that follows."""
    return _filled((prefix,) * num_stages, largest_stage(prefix, num_stages))


def balanced_stages(prefixes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The same where each stage has its own sizes of the layers, as on unlike devices."""
    return _filled(prefixes, _least_size(prefixes, 0))


def largest_stage(prefix: tuple[int, ...], num_stages: int) -> int:
    """The least size that the largest stage of a split can have."""
    low = max(max(b - a for a, b in itertools.pairwise(prefix)), -(-prefix[-1] // num_stages))
    return _least_size((prefix,) * num_stages, low)


def _least_size(prefixes: Sequence[tuple[int, ...]], low: int) -> int:
    """The same where each stage has its own sizes; it is no less than `low`."""
    num_layers, high = len(prefixes[0]) - 1, max(prefix[-1] for prefix in prefixes)
    while low < high:
        middle = (low + high) // 2
        if _filled(prefixes, middle)[-1] == num_layers:
            high = middle
        else:
            low = middle + 1
    return low


def _filled(prefixes: Sequence[tuple[int, ...]], most: int) -> tuple[int, ...]:
    """Stages of at most this size; the last boundary is short of the end where that is too few."""
    num_layers, boundaries = len(prefixes[0]) - 1, [0]
    for left, prefix in zip(reversed(range(len(prefixes))), prefixes, strict=True):
        first = boundaries[-1]
        end = bisect_right(prefix, prefix[first] + most, first + 1, num_layers + 1) - 1
        boundaries.append(max(first + 1, min(end, num_layers - left)))
    return tuple(boundaries)


def fits(instance: Instance, split: Split) -> bool:
    """Whether every rank is within its limit, by the memory model."""
    return overflow_units(instance, split) == (0, 0)


def improve(
    instance: Instance,
    split: Split,
    max_evaluations: int,
    keys_of: Callable[[Cuts, Flags], list[Key]] | None = None,
) -> Split:
    """Local search: shift a boundary, move a layer between distant stages, or change one stage's
    recompute where that is open. Every round takes the best of all neighbours by `keys_of`: by
    excess memory, then step time, then imbalance, unless something else is given."""
    if len(split.recompute) > MAX_STAGES_TO_IMPROVE:
        return split
    keys_of = keys_of or partial(_keys_in, instance)
    best, best_key = split, keys_of(*arrays([split]))[0]
    num_evaluations = 0
    while num_evaluations < max_evaluations:
        others = neighbours(instance, best)
        if not others:
            break
        keys = keys_of(*arrays(others))
        num_evaluations += len(others)
        first = min(range(len(others)), key=keys.__getitem__)
        if keys[first] >= best_key:
            break
        best, best_key = others[first], keys[first]
    return best


def arrays(splits: Sequence[Split]) -> tuple[Cuts, Flags]:
    """Boundaries and flags of splits, a row each."""
    cuts = np.array([split.boundaries for split in splits], dtype=np.int64)
    return cuts, np.array([split.recompute for split in splits], dtype=np.bool_)


def _keys_in(instance: Instance, cuts: Cuts, recompute: Flags) -> list[Key]:
    """What the local search makes smaller, of each split, under the layered order."""
    units = rank_units_of_many(instance, cuts, recompute)
    return keys_of_figures(instance, cuts, units, step_ticks_of_many(instance, cuts, recompute))


def keys_of_figures(instance: Instance, cuts: Cuts, units: Cuts, ticks: Cuts) -> list[Key]:
    """The same from the units of memory of each split's ranks, and from its time."""
    excess = np.maximum(0, units - np.array(instance.limit_units))
    time = np.array(instance.time, dtype=np.float64)
    imbalance = (np.diff(time[cuts], axis=1) ** 2).sum(axis=1)
    columns = (excess.max(axis=1), excess.sum(axis=1), ticks, imbalance)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def neighbours(instance: Instance, split: Split) -> list[Split]:
    """Valid splits with one boundary, or a run of boundaries, shifted by a layer or two, or one
    stage's recompute changed."""
    boundaries, found = split.boundaries, []
    inner = range(1, len(boundaries) - 1)
    reach = len(inner) if len(inner) < MAX_STAGES_FOR_DISTANT_MOVES else 4
    for length in range(1, reach + 1):
        for start in inner:
            end = start + length
            if end > len(boundaries) - 1:
                break
            for shift in (-1, 1, -2, 2):
                moved = [boundary + shift for boundary in boundaries[start:end]]
                if moved[0] > boundaries[start - 1] and moved[-1] < boundaries[end]:
                    shifted = (*boundaries[:start], *moved, *boundaries[end:])
                    found.append(Split(boundaries=shifted, recompute=split.recompute))
    for stage in range(len(boundaries) - 1) if instance.choice.recompute is None else ():
        flags = list(split.recompute)
        flags[stage] = not flags[stage]
        found.append(Split(boundaries=boundaries, recompute=tuple(flags)))
    return found


def warm_start(instance: Instance, max_evaluations: int = 1500) -> Split:
    """A good split: the best of several starts, after a local search. It may not fit memory."""
    stages = instance.choice.num_stages
    starts = {
        balanced_split(instance.time, stages),
        greedy_split(instance.time, stages),
        uniform_split(instance.num_layers, stages),
    }
    simple = [choose_recompute(instance, boundaries) for boundaries in sorted(starts)]
    best = improve(instance, _best(instance, simple), max_evaluations)
    if not fits(instance, best):
        for prefix in (instance.kept, instance.buffer):
            start = choose_recompute(instance, balanced_split(prefix, stages))
            best = _best(instance, [best, improve(instance, start, max_evaluations)])
    return best


def _best(instance: Instance, splits: Sequence[Split]) -> Split:
    keys = _keys_in(instance, *arrays(splits))
    return splits[min(range(len(splits)), key=keys.__getitem__)]
