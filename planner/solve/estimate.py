"""Splits of many choices without CP-SAT: a sketch of each, then a local search where it may pay.

A sketch, the best of a few simple splits, takes about a millisecond, so every choice that may fit
in memory gets one, and the order of the local searches is that of known step times. Every mesh
gets its turns, lest one mesh with many good choices use up the clock.
This module knows entries and the clock. It does not know CP-SAT or simulations.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from planner.solve.bounds import least_rank_units
from planner.solve.entry import Clock, Entry
from planner.solve.infeasible import MAX_TRIES, by_headroom
from planner.solve.instance import overflow_units, step_ticks
from planner.solve.splits import (
    balanced_split,
    fits,
    greedy_split,
    uniform_split,
    warm_start,
)

__all__ = ["MODEL_TOLERANCE", "NO_FIT_FOUND", "estimate", "start"]

MAX_ESTIMATES = 60
MODEL_TOLERANCE = 1.03
"""The simulator may prefer a choice whose bound is so much above the best objective: the step-time
model leaves out what transfers of skip connections and reductions of tied weights share."""
NO_FIT_FOUND = "infeasible: no split that fits was found, nor proved that there is none"


def estimate(entries: Sequence[Entry], clock: Clock) -> None:
    """A split for every entry whose bound is below the best one found, as far as time allows."""
    possible = []
    for entry in entries:
        if least_rank_units(entry.instance) > max(entry.instance.limit_units):
            entry.verdict = "infeasible: no rank has the memory that some rank needs"
            entry.is_impossible = True
        else:
            possible.append(entry)
    best = _sketch_all(possible, clock)
    num_estimates = 0
    for entry in list(_in_turns(possible)):
        if entry.bound_seconds > best * MODEL_TOLERANCE:
            continue
        if num_estimates >= MAX_ESTIMATES or clock.spent > clock.limit_seconds / 4:
            break
        num_estimates += 1
        start(entry)
        best = min(best, entry.objective_seconds)
    if best == math.inf:
        best = _start_roomiest(possible, clock)
    _judge(possible, best, num_estimates)


def start(entry: Entry) -> None:
    """Local search; keeps the entry's split where that is better or the search finds none."""
    boundaries, before = warm_start(entry.instance), entry.objective_seconds
    entry.verdict = "estimated"
    if fits(entry.instance, boundaries):
        known, entry.boundaries = entry.boundaries, boundaries
        if entry.objective_seconds > before:
            entry.boundaries = known
    elif entry.boundaries is None:
        entry.verdict = NO_FIT_FOUND


def _sketch_all(entries: Sequence[Entry], clock: Clock) -> float:
    """The least objective found. On a slow machine the clock ends it once something fits."""
    best = math.inf
    for entry in _by_mesh(entries, lambda entry: entry.bound_seconds):
        if best < math.inf and clock.spent > clock.limit_seconds / 8:
            break
        _sketch(entry)
        best = min(best, entry.objective_seconds)
    return best


def _sketch(entry: Entry) -> None:
    """The fastest of the simple splits that fits, and the entry's score."""
    instance, stages = entry.instance, entry.instance.choice.num_stages
    splits = {
        uniform_split(instance.num_layers, stages),
        greedy_split(instance.time, stages),
        balanced_split(instance.time, stages),
        balanced_split(instance.kept, stages),
        balanced_split(instance.buffer, stages),
    }
    limit = max(1, min(instance.limit_units))
    for split in sorted(splits):
        excess, _ = overflow_units(instance, split)
        ticks = step_ticks(instance, split)
        seconds = ticks * instance.tick_seconds
        # What does not fit yet is the less promising, the more it lacks.
        entry.score_seconds = min(entry.score_seconds, seconds * (1 + excess / limit))
        if excess == 0 and seconds < entry.objective_seconds:
            entry.boundaries = split


def _in_turns(entries: Sequence[Entry]) -> Iterator[Entry]:
    return _by_mesh(entries, lambda entry: min(entry.score_seconds, entry.objective_seconds))


def _by_mesh(entries: Sequence[Entry], key: Callable[[Entry], float]) -> Iterator[Entry]:
    """The best of each mesh, best mesh first; then each one's second best, and so on.

    Where the key is equal, more stages and more micro-batches come first: their buffers are
    smaller and their transfers hide better.
    """

    def rank(entry: Entry) -> tuple[float, int, int]:
        choice = entry.instance.choice
        return key(entry), -choice.num_stages, -choice.num_micro_batches

    meshes: dict[tuple[int, int], list[Entry]] = {}
    for entry in sorted(entries, key=rank):
        meshes.setdefault(entry.mesh, []).append(entry)
    for turn in itertools.zip_longest(*meshes.values()):
        yield from (entry for entry in turn if entry is not None)


def _start_roomiest(entries: Sequence[Entry], clock: Clock) -> float:
    """Nothing fits yet: search the roomiest, some of them whatever the clock says."""
    by_instance = {id(entry.instance): entry for entry in entries}
    for number, instance in enumerate(by_headroom([entry.instance for entry in entries])):
        if number >= MAX_TRIES and clock.spent > clock.limit_seconds / 2:
            break
        entry = by_instance[id(instance)]
        start(entry)
        if entry.boundaries is not None:
            return entry.objective_seconds
    return math.inf


def _judge(entries: Sequence[Entry], best_seconds: float, num_estimates: int) -> None:
    """The verdict on each entry so far."""
    for entry in entries:
        if entry.bound_seconds > best_seconds * MODEL_TOLERANCE:
            entry.verdict = "bounded"
            entry.boundaries = None
        elif entry.boundaries is not None:
            entry.verdict = "estimated"
        elif entry.score_seconds == math.inf:
            entry.verdict = "not tried: the time limit came first"
        elif entry.verdict != NO_FIT_FOUND:
            entry.verdict = (
                f"not tried: no simple split fits, and {num_estimates} more promising choices "
                "came first"
            )
