"""Splits without CP-SAT: the two simple ones, a dynamic programme, and a local search.

They give CP-SAT its hint, and the baselines that the answer is compared with. This module knows
the Instance alone.
"""

import itertools
from collections.abc import Iterator

import numpy

from planner.solve.instance import Instance, overflow_units, step_ticks

__all__ = ["balanced_split", "fits", "greedy_split", "improve", "uniform_split", "warm_start"]

# Moves over a distance need one boundary list per pair of stages: only where that is few.
MAX_STAGES_FOR_DISTANT_MOVES = 24


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
    """The split whose largest stage is smallest, by dynamic programming.

    best[s][j], the largest of s stages that hold layers 0 .. j - 1, is the least over i of
    max(best[s - 1][i], cost of layers i .. j - 1).
    """
    num_layers = len(prefix) - 1
    sums = numpy.array(prefix, dtype=numpy.int64)
    never = numpy.iinfo(numpy.int64).max
    cost = sums[None, :] - sums[:, None]
    cost[numpy.tril_indices(num_layers + 1)] = never
    best = cost[0]
    origins = []
    for _ in range(1, num_stages):
        largest = numpy.maximum(best[:, None], cost)
        origin = largest.argmin(axis=0)
        best = largest[origin, numpy.arange(num_layers + 1)]
        origins.append(origin)
    boundaries = [num_layers]
    for origin in reversed(origins):
        boundaries.append(int(origin[boundaries[-1]]))
    return (*([0] if num_stages >= 1 else []), *reversed(boundaries))


Key = tuple[int, int, int, int]


def _key(instance: Instance, boundaries: tuple[int, ...]) -> Key:
    """What the local search makes smaller: excess memory, then step time, then imbalance."""
    time = instance.time
    imbalance = sum((time[b] - time[a]) ** 2 for a, b in itertools.pairwise(boundaries))
    return (*overflow_units(instance, boundaries), step_ticks(instance, boundaries), imbalance)


def fits(instance: Instance, boundaries: tuple[int, ...]) -> bool:
    """Whether every rank is within its limit, by the memory model."""
    return overflow_units(instance, boundaries) == (0, 0)


def improve(
    instance: Instance, boundaries: tuple[int, ...], max_evaluations: int
) -> tuple[int, ...]:
    """Local search: shift one boundary, or move a layer between distant stages."""
    best, best_key = boundaries, _key(instance, boundaries)
    num_evaluations = 0
    improved = True
    while improved:
        improved = False
        for neighbour in _neighbours(best):
            key = _key(instance, neighbour)
            num_evaluations += 1
            if key < best_key:
                best, best_key, improved = neighbour, key, True
                break
            if num_evaluations >= max_evaluations:
                return best
    return best


def _neighbours(boundaries: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Valid splits with one boundary, or a run of boundaries, shifted by a layer or two."""
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
                    yield (*boundaries[:start], *moved, *boundaries[end:])


def warm_start(instance: Instance, max_evaluations: int = 1500) -> tuple[int, ...]:
    """A good split: the best of several starts, after a local search. It may not fit memory."""
    stages = instance.choice.num_stages
    starts = {
        balanced_split(instance.time, stages),
        greedy_split(instance.time, stages),
        uniform_split(instance.num_layers, stages),
    }
    best = min(starts, key=lambda split: _key(instance, split))
    best = improve(instance, best, max_evaluations)
    if not fits(instance, best):
        for prefix in (instance.kept, instance.buffer):
            start = balanced_split(prefix, stages)
            other = improve(instance, start, max_evaluations)
            best = min(best, other, key=lambda split: _key(instance, split))
    return best
