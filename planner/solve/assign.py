"""Stages on other ranks than s mod P, where that pays.

It pays where the first and the last layer share weights, which one rank may then hold and update
alone; where some ranks are slower than others, which may then have fewer stages; and where one
layer, most often the head, takes as long as several, so that its rank should have little else. The
search begins at a few assignments made for these, and goes on by moves: a stage to another rank,
two ranks in each other's place, a stage cut in two, or given up. Neighbouring stages are always on
different ranks. Whatever is tried has boundaries and recompute of its own.
This module knows the step-time and memory models. It does not know the simulator.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from planner.solve.bounds import least_step_ticks
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.entry import Clock
from planner.solve.instance import Instance, overflow_units, step_ticks
from planner.solve.problem import Constraints
from planner.solve.recompute import choose_recompute
from planner.solve.sketch import sketch
from planner.solve.splits import improve
from planner.solve.trial import Trial
from planner.solve.types import Split

__all__ = [
    "WORTH", "Assignment", "assigned", "assigned_trials", "assignments", "may_assign"
]  # fmt: skip

Assignment = tuple[int, ...]
"""Pipeline rank of each stage."""

WORTH = 1 - 1e-3
"""A gain of less is not worth leaving the rule s mod P for."""
MAX_BASES = 4
"""Meshes and batchings whose stages are put on other ranks."""
NEAR_BASE = 1.3
"""None that is so much slower than the best is tried."""
MAX_STAGES = 96
EFFORT_OF_SECOND = 1500
"""Stages and layers to be read for each second of the time limit: a sixteenth of it at most."""
MAX_EVALUATIONS = 400
"""Of each local search of boundaries."""
CUTS = 20
"""Such a local search reads about as much as so many splits on their own."""


def may_assign(wanted: Constraints) -> bool:
    """Whether the demands leave it open which rank a stage is on."""
    return not wanted.modular and wanted.stages_per_rank is None


def assigned(choice: Choice, ranks: Assignment) -> Choice:
    """The choice with its stages on these ranks."""
    modular = tuple(stage % choice.num_pipeline_ranks for stage in range(len(ranks)))
    counts = Counter(ranks)
    is_modular = ranks == modular and len(set(counts.values())) == 1
    return replace(
        choice, stages_per_rank=max(counts.values()), assignment=() if is_modular else ranks
    )


def assignments(num_stages: int, num_ranks: int, *, alike: bool) -> Iterator[Assignment]:
    """All that use every rank and have neighbouring stages on different ranks, s mod P first.

    Where ranks are `alike`, one of those that differ in nothing but the ranks' names.
    """

    def grow(ranks: Assignment) -> Iterator[Assignment]:
        used = len(set(ranks))
        if num_stages - len(ranks) < num_ranks - used:
            return
        if len(ranks) == num_stages:
            yield ranks
            return
        last = ranks[-1] if ranks else -1
        known = max(ranks, default=-1) + 1
        for step in range(num_ranks):
            rank = (last + 1 + step) % num_ranks
            if rank != last and not (alike and rank > known):
                yield from grow((*ranks, rank))

    if num_ranks == 1:
        yield (0,) * num_stages
    else:
        yield from grow(())


def assigned_trials(
    builder: Builder, trials: Sequence[Trial], best_seconds: float, clock: Clock
) -> list[Trial]:
    """Of the trials that look best, the same with stages on other ranks where that looks faster.

    `best_seconds` is the step to beat. The effort grows with the time limit; the answer is always
    the same unless the clock ends the search first.
    """
    bases = _bases(trials, best_seconds)
    effort = round(EFFORT_OF_SECOND * builder.problem.time_limit_seconds)
    found = []
    for number, trial in enumerate(bases):
        share = effort // (len(bases) - number)
        climb = _Climb(builder=builder, base=trial, effort=share, clock=clock)
        best = climb.run(best_seconds)
        effort -= share - max(0, climb.effort)
        if best is not None:
            found.append(best.trial())
    return sorted(found, key=lambda trial: trial.objective_seconds)


def _bases(trials: Sequence[Trial], best_seconds: float) -> list[Trial]:
    """The best trial of each mesh, batching and way to hold state."""
    found: dict[object, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.objective_seconds):
        choice = trial.instance.choice
        if trial.split is None or choice.num_pipeline_ranks == 1 or choice.num_stages > MAX_STAGES:
            continue
        if trial.objective_seconds < NEAR_BASE * best_seconds:
            found.setdefault(replace(choice, stages_per_rank=1, num_buffers=2), trial)
    return list(found.values())[:MAX_BASES]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """An assignment with the best split known of it."""

    instance: Instance
    split: Split

    @property
    def key(self) -> tuple[int, float]:
        """What the search makes smaller: excess memory, then seconds."""
        excess = overflow_units(self.instance, self.split)[1] * self.instance.unit_bytes
        return excess, step_ticks(self.instance, self.split) * self.instance.tick_seconds

    def trial(self) -> Trial:
        bound = least_step_ticks(self.instance) * self.instance.tick_seconds
        trial = Trial(instance=self.instance, bound_seconds=bound)
        trial.offer(self.split)
        return trial


@dataclass(slots=True, kw_only=True)
class _Climb:
    """A search around one trial."""

    builder: Builder
    base: Trial
    effort: int
    """Stages and layers that may still be read."""
    clock: Clock
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.builder.problem.seed)

    @property
    def is_over(self) -> bool:
        return self.effort <= 0 or self.clock.left <= 0

    def run(self, best_seconds: float) -> _Found | None:
        """The best assignment found, if it looks worth more than s mod P."""
        assert self.base.split is not None
        best = _Found(instance=self.base.instance, split=self.base.split)
        key = best.key
        for ranks in self._starts():
            found = self._sketched(ranks)
            if found is not None and found.key < key:
                best, key = found, found.key
        moves = self._moves(best)
        while not self.is_over and (move := next(moves, None)) is not None:
            found = self._moved(*move)
            if found.key < key:
                found = self._improved(found)
                best, key = found, found.key
                moves = self._moves(best)
        excess, seconds = key
        is_modular = not best.instance.choice.assignment
        return None if is_modular or excess or seconds >= best_seconds * WORTH else best

    def _starts(self) -> list[Assignment]:
        """One more stage or some, so that the last is on another rank; slow ranks left out of some
        rounds; ranks in the order of their speed."""
        instance, choice = self.base.instance, self.base.instance.choice
        ranks, rounds = choice.num_pipeline_ranks, choice.stages_per_rank
        ring = tuple(range(ranks))
        speeds = _speeds(instance)
        by_speed = sorted(ring, key=lambda rank: -speeds[rank])
        found: list[Assignment] = []
        for turns in sorted({1, 2, rounds, rounds + 1}):
            for rest in sorted({0, 1, ranks // 2, ranks - 1}):
                found.append((*(ring * turns), *ring[:rest]))
                found.append((*ring[ranks - rest :], *(ring * turns)))
            for order in dict.fromkeys((ring, tuple(by_speed), tuple(by_speed[::-1]))):
                found.append(order * turns)
                found.append(_rounds(order, speeds, turns))
        modular = choice.stage_ranks
        return [ranks for ranks in dict.fromkeys(found) if ranks != modular and self._is_one(ranks)]

    def _is_one(self, ranks: Assignment) -> bool:
        """Whether it is an assignment at all."""
        choice = self.base.instance.choice
        return (
            len(ranks) <= min(self.base.instance.num_layers, MAX_STAGES)
            and len(set(ranks)) == choice.num_pipeline_ranks
            and all(one != other for one, other in itertools.pairwise(ranks))
        )

    def _instance(self, ranks: Assignment) -> Instance:
        self.effort -= self.base.instance.num_layers + len(ranks)
        return self.builder.instance(assigned(self.base.instance.choice, ranks))

    def _sketched(self, ranks: Assignment) -> _Found | None:
        if self.is_over:
            return None
        instance = self._instance(ranks)
        split = sketch(instance)
        if split is None:
            return None
        return self._improved(_Found(instance=instance, split=split))

    def _improved(self, found: _Found) -> _Found:
        self.effort -= CUTS * len(found.split.recompute)
        return replace(found, split=improve(found.instance, found.split, MAX_EVALUATIONS))

    def _moved(self, ranks: Assignment, boundaries: tuple[int, ...]) -> _Found:
        instance = self._instance(ranks)
        return _Found(instance=instance, split=choose_recompute(instance, boundaries))

    def _moves(self, found: _Found) -> Iterator[tuple[Assignment, tuple[int, ...]]]:
        """Neighbouring assignments with boundaries, in random order."""
        ranks, cuts = found.instance.choice.stage_ranks, found.split.boundaries
        moves = [*self._rank_moves(ranks, cuts), *self._cut_moves(ranks, cuts)]
        valid = [move for move in dict.fromkeys(moves) if self._is_one(move[0])]
        self.generator.shuffle(valid)
        return iter(valid)

    def _rank_moves(
        self, ranks: Assignment, cuts: tuple[int, ...]
    ) -> Iterator[tuple[Assignment, tuple[int, ...]]]:
        """A stage to another rank; two ranks in each other's place, where they differ."""
        everyone = range(self.base.instance.choice.num_pipeline_ranks)
        for stage, rank in itertools.product(range(len(ranks)), everyone):
            yield (*ranks[:stage], rank, *ranks[stage + 1 :]), cuts
        speeds = _speeds(self.base.instance)
        for one, other in itertools.combinations(everyone, 2):
            if speeds[one] != speeds[other]:
                names = {one: other, other: one}
                yield tuple(names.get(rank, rank) for rank in ranks), cuts

    def _cut_moves(
        self, ranks: Assignment, cuts: tuple[int, ...]
    ) -> Iterator[tuple[Assignment, tuple[int, ...]]]:
        """A stage cut in two, one half on another rank; a stage given up to its neighbour."""
        everyone = range(self.base.instance.choice.num_pipeline_ranks)
        for stage, (first, end) in enumerate(itertools.pairwise(cuts)):
            for cut in sorted(
                {first + 1, (first + end) // 2, end - 1} & set(range(first + 1, end))
            ):
                parts = (*cuts[: stage + 1], cut, *cuts[stage + 1 :])
                for rank in everyone:
                    yield (*ranks[:stage], rank, *ranks[stage:]), parts
                    yield (*ranks[: stage + 1], rank, *ranks[stage + 1 :]), parts
            fewer = (*ranks[:stage], *ranks[stage + 1 :])
            for gone in (stage, stage + 1):
                if 0 < gone < len(ranks):
                    yield fewer, (*cuts[:gone], *cuts[gone + 1 :])


def _speeds(instance: Instance) -> list[float]:
    """Of each rank, as a part of the fastest one's."""
    ticks = [kind.forward.prefix[-1] + kind.backward.prefix[-1] for kind in instance.kinds]
    return [min(ticks) / max(1, ticks[kind]) for kind in instance.rank_kinds]


def _rounds(order: Sequence[int], speeds: Sequence[float], turns: int) -> Assignment:
    """So many rounds, of which a rank takes part in as many as its speed says."""
    return tuple(
        rank
        for turn in range(turns)
        for rank in order
        if int((turn + 1) * speeds[rank] + 1e-9) > int(turn * speeds[rank] + 1e-9)
    )
