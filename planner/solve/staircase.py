"""A split for ranks with many short stages: a beam search over the cuts, first to last.

A rank that finishes a stage early waits for the ranks before it, and the time is lost; where it is
late, so are all ranks behind it in this round. So it is not enough that the ranks' loads are equal
at the end: up to every round, no rank may have much less behind it than the ranks before it have.
Cuts are placed one after the other, and among partial splits those are kept on which the ranks have
waited least, and which do not run ahead of an even course. Every round may rise from the first rank
to the last, so that a rank with a long stage does no harm; the last round makes up for that.

In the layered order backward is the mirror of forward: what a rank has still to do after a moment
of backward follows from the stages up to there as what it has done in forward does. So both passes
are followed from the first cut on, and the step is their sum, but for updates and weights; the
step-time model says what a split really takes.
This module knows the Instance alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.solve.instance import Instance
from planner.solve.tables import least

__all__ = ["Course", "all_courses", "climbs", "few_courses", "staircase"]

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

MOST = 8
"""Of mean stages, or of layers where stages are shorter: the longest that is tried."""
BRANCHES = 4
"""Of every partial split that is kept, so many are looked at, whatever their last cut is."""
PER_CUT = 6
"""Part of the partial splits that may end at one cut: one in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """An even course, and how much it counts to keep to it."""

    rise: float
    """By which the last rank is behind the first in every round but the last, in mean layers."""
    ahead: float
    """What a mean layer ahead of the course weighs, in mean layers of waiting."""
    behind: float
    margin: float
    """By which the course ends later than the split so far tells, in mean layers."""


def all_courses() -> Iterator[Course]:
    """Those of which one or the other has led to the best split, on chains of many kinds."""
    for rise, ahead, behind, margin in itertools.product((0, 4, 8), (3, 10), (0, 0.3), (0, 1)):
        yield Course(rise=rise, ahead=ahead, behind=behind, margin=margin)


def few_courses() -> Iterator[Course]:
    """Those that are seldom far from the best."""
    yield Course(rise=0, ahead=3, behind=0, margin=1)
    yield Course(rise=4, ahead=10, behind=0.3, margin=1)
    yield Course(rise=0, ahead=3, behind=0.3, margin=1)


def climbs(instance: Instance) -> bool:
    """Whether ranks take turns: stage s on rank s mod P, and several stages each."""
    choice = instance.choice
    several = choice.num_pipeline_ranks > 1 and choice.stages_per_rank > 1
    return several and instance.pace.is_modular


@dataclass(slots=True, kw_only=True)
class _Beam:
    """Partial splits with as many cuts each: their first axis is the pass, their second the split.

    Of backward, moments are counted from the end.
    """

    cut: Whole
    """The last one, of each split."""
    held: Floats
    """Per pipeline rank, the third axis: when its last stage is done."""
    opened: Floats
    """When the first micro-batch has left the last stage."""
    closed: Floats
    waited: Floats
    """By all ranks together."""


def staircase(instance: Instance, course: Course, width: int) -> tuple[int, ...]:
    """Cuts of a good split by the step time, memory left aside.

    Args:
        instance: one that `climbs`.
        width: how many partial splits are kept.
    """
    forward = np.array(least([kind.forward for kind in instance.kinds]).prefix, dtype=np.float64)
    time = np.stack([forward, np.array(instance.time) - forward])
    stages, ranks = instance.choice.num_stages, instance.choice.num_pipeline_ranks
    layers, count = instance.num_layers, instance.choice.num_micro_batches
    nothing = np.zeros((2, 1))
    beam = _Beam(
        cut=np.zeros(1, dtype=np.int64),
        held=np.zeros((2, 1, ranks)),
        opened=nothing,
        closed=nothing,
        waited=nothing,
    )
    most = max(MOST, -(-MOST * layers // stages))
    steps: list[tuple[Whole, Whole]] = []
    for stage, hop in enumerate(_hops(instance)):
        ends = beam.cut[:, None] + np.arange(1, most + 1)
        if stage == stages - 1:
            ends = np.full((len(beam.cut), 1), layers)
        allowed = ends <= layers - (stages - 1 - stage)
        span = time[:, np.minimum(ends, layers)] - time[:, beam.cut][:, :, None]
        grown = _grow(beam, span, stage % ranks, count, hop[:, None])
        scores = _scores(instance, course, stage, grown)
        chosen = _kept(np.where(allowed, scores, np.inf), ends, width)
        rows, columns = np.divmod(chosen, ends.shape[1])
        held = beam.held[:, rows]
        opened, closed, waited = (values[:, rows, columns] for values in grown)
        held[:, :, stage % ranks] = closed
        cut = ends[rows, columns]
        beam = _Beam(cut=cut, held=held, opened=opened, closed=closed, waited=waited)
        steps.append((rows, cut))
    return _traced(steps, int(np.argmin(beam.closed.sum(axis=0))))


def _hops(instance: Instance) -> Sequence[Floats]:
    """Of each stage: ticks to receive a micro-batch, and to return its gradients, at a mean cut."""
    tables = zip(instance.hops, instance.gradient_hops, strict=True)
    kinds = [np.array([np.mean(way[1:-1]) for way in ways]) for ways in tables]
    return [np.zeros(2), *(kinds[kind] for kind in instance.hop_kinds[1:])]


Grown = tuple[Floats, Floats, Floats]
"""When the next stage is opened and closed, and what has been waited then, by its end."""


def _grow(beam: _Beam, span: Floats, rank: int, count: int, hop: Floats) -> Grown:
    """Each partial split with a stage more, of every length: a column each."""
    free = beam.held[:, :, rank][:, :, None]
    opened = np.maximum(free, (beam.opened + hop)[:, :, None]) + span
    closed = np.maximum(opened + (count - 1) * span, (beam.closed + hop)[:, :, None] + span)
    waited = beam.waited[:, :, None] + closed - free - count * span
    return opened, closed, waited


def _scores(instance: Instance, course: Course, stage: int, grown: Grown) -> Floats:
    """What the search makes smaller, in mean layers of a whole step."""
    choice, whole = instance.choice, instance.time[-1]
    ranks, rounds = choice.num_pipeline_ranks, choice.stages_per_rank
    turn, rank = divmod(stage, ranks)
    unit = choice.num_micro_batches * whole / instance.num_layers
    # From one rank to the next a micro-batch takes a stage.
    lag = whole / choice.num_stages
    _, closed, waited = (values.sum(axis=0) for values in grown)
    end = (choice.num_micro_batches * whole + waited) / ranks + course.margin * unit
    if turn < rounds - 1:
        lag += course.rise * unit / max(1, ranks - 1)
    target = end * (turn + 1) / rounds + (rank - (ranks - 1) / 2) * lag
    off = (closed - target) / unit
    scores: Floats = waited / unit
    scores += course.ahead * np.maximum(0, off) + course.behind * np.maximum(0, -off)
    return scores


def _kept(scores: Floats, ends: Whole, width: int) -> Whole:
    """Flat indices of the best, best first; not too many of them with one last cut."""
    flat, cuts = scores.ravel(), ends.ravel()
    best = np.argsort(flat, kind="stable")[: BRANCHES * width]
    best = best[np.isfinite(flat[best])]
    order = np.argsort(cuts[best], kind="stable")
    alike = cuts[best][order]
    starts = np.flatnonzero(np.diff(alike, prepend=-1))
    sizes = np.diff(starts, append=len(alike))
    places = np.arange(len(alike)) - np.repeat(starts, sizes)
    found: Whole = best[np.sort(order[places < max(1, width // PER_CUT)])][:width]
    return found


def _traced(steps: Sequence[tuple[Whole, Whole]], row: int) -> tuple[int, ...]:
    """The cuts that led to a row of the last beam."""
    cuts: list[int] = []
    for rows, ends in reversed(steps):
        cuts.append(int(ends[row]))
        row = int(rows[row])
    return (0, *reversed(cuts))
