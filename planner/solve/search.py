"""The search over choices: bound, estimate, refine, simulate.

This module knows the order of the steps and the clock. What a choice costs, how it is split and
what it takes in memory is known elsewhere.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import (
    Boundaries,
    Clock,
    Entry,
    candidate_of,
    make_entry,
    placement_of,
    shortlist,
)
from planner.solve.estimate import MODEL_TOLERANCE, NO_FIT_FOUND, estimate, start
from planner.solve.infeasible import explain, with_margin
from planner.solve.instance import rank_units, step_ticks
from planner.solve.model import solve_split
from planner.solve.problem import Problem, Simulated
from planner.solve.sizes import Sizes
from planner.solve.splits import greedy_split, uniform_split, warm_start
from planner.solve.types import Placement, Solution

__all__ = ["solve"]

MAX_TIGHT = 6
"""Choices without a fitting start for which CP-SAT is asked, by either measure."""
MAX_CORRECTIONS = 3
WINDOW = 4
MAX_SPLIT_SECONDS = 4.0


def solve(problem: Problem, simulate: Callable[[Placement], Simulated]) -> Solution:
    """The placement whose simulated step is shortest, with its certificate.

    Raises UsageError if the demands contradict each other, the model or the cluster, and
    InfeasibleError if nothing fits in memory. Placements that use all devices come first; fewer
    are used only if none of those fits. A micro-batch size that the model cannot be traced with
    is left out, unless it is the only one: then that TraceError is raised.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    sizes = Sizes(problem=problem, clock=clock)
    num_layers = sizes.count_layers()
    check_problem(problem, num_layers)
    search = _Search(problem=problem, simulate=simulate, clock=clock, sizes=sizes)
    for choices in mesh_groups(problem, num_layers, accepts=sizes.accepts):
        best = search.best_of(choices)
        if best is not None:
            return search.solution(best)
        if clock.left < clock.limit_seconds / 2:
            break
    sizes.raise_if_all_refused()
    first_group = next(mesh_groups(problem, num_layers, accepts=sizes.accepts))
    raise explain(
        problem,
        search.builder,
        [
            search.builder.instance(choice)
            for choice in first_group
            if sizes.accepts(choice.micro_batch_size)
        ],
        search.margin_bytes,
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    problem: Problem
    simulate: Callable[[Placement], Simulated]
    clock: Clock
    sizes: Sizes
    builder: Builder = field(init=False)
    entries: list[Entry] = field(default_factory=list)
    refused: list[Choice] = field(default_factory=list)
    """Choices of a micro-batch size that the model cannot be traced with."""
    margin_bytes: int = 0
    """Largest excess of a simulated peak over the memory model."""

    def __post_init__(self) -> None:
        self.builder = Builder(problem=self.problem)

    def best_of(self, choices: Iterable[Choice]) -> Entry | None:
        """The fastest simulated entry among the choices; None if none fits."""
        entries = []
        for choice in choices:
            if self.sizes.accepts(choice.micro_batch_size):
                entries.append(make_entry(self.builder.instance(choice)))
            else:
                self.refused.append(choice)
        self.entries += entries
        estimate(entries, self.clock)
        self._rescue(entries)
        self._improve(entries)
        chosen = shortlist(entries)
        best: Entry | None = None
        for entry in sorted(chosen, key=lambda entry: entry.objective_seconds):
            if best is not None and self.clock.left <= 0:
                entry.verdict = "not simulated: the time limit came first"
                continue
            self._simulate(entry)
            if entry.step_seconds is not None and (
                best is None or entry.step_seconds < (best.step_seconds or math.inf)
            ):
                best = entry
        return best

    def _rescue(self, entries: list[Entry]) -> None:
        """By CP-SAT where memory is tight: a fit for the most promising, a proof that there is
        none for those whose bounds are lowest."""
        best = min((entry.objective_seconds for entry in entries), default=math.inf)
        tight = [
            entry
            for entry in entries
            if entry.boundaries is None
            and not entry.is_impossible
            and entry.bound_seconds <= best * MODEL_TOLERANCE
        ]
        chosen = dict.fromkeys(
            (
                *sorted(tight, key=lambda entry: entry.score_seconds)[:MAX_TIGHT],
                *sorted(tight, key=lambda entry: entry.bound_seconds)[:MAX_TIGHT],
            )
        )
        end = self.clock.spent + self.clock.left / 2
        for number, entry in enumerate(chosen):
            if entry.bound_seconds <= best * MODEL_TOLERANCE:
                self._refine(entry, (end - self.clock.spent) / (len(chosen) - number))
                best = min(best, entry.objective_seconds)

    def _improve(self, entries: list[Entry]) -> None:
        """CP-SAT on the shortlist, then on whatever else might still be better than its best."""
        chosen = shortlist(entries)
        end = self.clock.spent + self.clock.left / 2
        for index, entry in enumerate(chosen):
            self._refine(entry, (end - self.clock.spent) / (len(chosen) - index))
        best = min((entry.objective_seconds for entry in chosen), default=math.inf)
        rivals = [
            entry
            for entry in entries
            if entry.verdict == "estimated" and entry not in chosen and entry.is_small
        ]
        end = self.clock.spent + self.clock.left / 4
        for entry in sorted(rivals, key=lambda entry: entry.bound_seconds):
            if entry.bound_seconds >= best or self.clock.spent >= end:
                break
            self._refine(entry, end - self.clock.spent)
            best = min(best, entry.objective_seconds)
            if entry.bound_seconds > best * MODEL_TOLERANCE:
                entry.verdict = "bounded"

    def _refine(self, entry: Entry, seconds: float) -> None:
        """Let CP-SAT improve, or find, the entry's split."""
        instance = entry.instance
        hint = entry.boundaries or warm_start(instance)
        known = step_ticks(instance, hint) if entry.boundaries else None
        if known == entry.bound_ticks or seconds <= 0:
            return
        whole = entry.is_small
        split = solve_split(
            instance,
            hint=hint,
            window=None if whole or not entry.boundaries else WINDOW,
            time_limit_seconds=min(MAX_SPLIT_SECONDS, seconds),
            seed=self.problem.seed,
        )
        if whole:
            entry.bound_ticks = max(entry.bound_ticks, split.bound_ticks)
        if split.boundaries is not None:
            if known is None or step_ticks(instance, split.boundaries) < known:
                entry.boundaries = split.boundaries
            entry.verdict = "estimated"
        elif split.proved and entry.boundaries is None:
            entry.verdict = "infeasible: proved that no split fits"
            entry.is_impossible = True
        elif entry.boundaries is None:
            entry.verdict = NO_FIT_FOUND

    def _simulate(self, entry: Entry) -> None:
        """Simulate the entry's split; where its peak is above the memory model, split again."""
        for _ in range(MAX_CORRECTIONS):
            if entry.boundaries is None:
                break
            choice = entry.instance.choice
            simulated = self.simulate(placement_of(choice, entry.boundaries))
            if self._fits(choice, simulated):
                entry.step_seconds = simulated.step_seconds
                entry.verdict = "simulated"
                return
            self._correct(entry, simulated)
        entry.boundaries = None
        entry.verdict = "infeasible: the simulated peak exceeds the memory limit"

    def _correct(self, entry: Entry, simulated: Simulated) -> None:
        assert entry.boundaries is not None
        instance = entry.instance
        margins = [
            max(0, peak - units * instance.unit_bytes)
            for peak, units in zip(
                simulated.peak_bytes, rank_units(instance, entry.boundaries), strict=True
            )
        ]
        self.margin_bytes = max(self.margin_bytes, *margins)
        entry.instance = with_margin(instance, margins)
        entry.boundaries = None
        start(entry)
        if entry.boundaries is None:
            self._refine(entry, self.clock.left / 4)
            # Another split may need a smaller margin than this one: nothing is proved.
            entry.is_impossible = False

    def _fits(self, choice: Choice, simulated: Simulated) -> bool:
        limits = self.builder.mesh_of(choice).limit_bytes
        return all(p <= limit for p, limit in zip(simulated.peak_bytes, limits, strict=True))

    def _baseline(self, best: Entry, boundaries: Boundaries) -> float | None:
        """Simulated step of a simple split of the best mesh, which it replaces if faster."""
        choice = best.instance.choice
        if boundaries == best.boundaries:
            return best.step_seconds
        simulated = self.simulate(placement_of(choice, boundaries))
        if not self._fits(choice, simulated):
            return None
        assert best.step_seconds is not None
        if simulated.step_seconds < best.step_seconds:
            best.boundaries, best.step_seconds = boundaries, simulated.step_seconds
        return simulated.step_seconds

    def solution(self, best: Entry) -> Solution:
        """The answer, with the simple splits beside it and the fate of every candidate."""
        best.verdict = "best"
        choice, instance = best.instance.choice, best.instance
        uniform = self._baseline(best, uniform_split(instance.num_layers, choice.num_stages))
        greedy = self._baseline(best, greedy_split(instance.time, choice.num_stages))
        possible = (entry for entry in self.entries if not entry.is_impossible)
        objective = best.objective_seconds
        assert best.boundaries is not None
        assert best.step_seconds is not None
        return Solution(
            placement=placement_of(choice, best.boundaries),
            step_seconds=best.step_seconds,
            objective_seconds=objective,
            bound_seconds=min(
                objective, best.step_seconds, *(entry.bound_seconds for entry in possible)
            ),
            solve_seconds=self.clock.spent,
            uniform_seconds=uniform,
            greedy_seconds=greedy,
            candidates=(
                *(candidate_of(entry) for entry in self.entries),
                *(self.sizes.candidate(choice) for choice in self.refused),
            ),
        )
