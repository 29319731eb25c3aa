"""The search: small spaces in full, large ones by branch and bound; the simulator is the judge.

This module knows the order of the steps and the clock. What a choice costs, how it is split and
what it takes in memory is known elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.solve.bounds import least_step_ticks
from planner.solve.branch import Branches, Node
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import Clock, placement_of
from planner.solve.exact import CAREFUL, is_chain, is_small, ranked
from planner.solve.infeasible import excess_bytes, explain, lean_splits, with_margin
from planner.solve.instance import Instance, step_ticks
from planner.solve.problem import Problem, Simulated
from planner.solve.rates import Rates
from planner.solve.recompute import choose_recompute
from planner.solve.refine import refine
from planner.solve.sizes import Sizes
from planner.solve.sketch import sketch
from planner.solve.space import Batching, all_options, batchings, choice_of
from planner.solve.splits import fits, greedy_split, uniform_split
from planner.solve.trial import Trial, candidate_of
from planner.solve.types import Placement, Solution

__all__ = ["Progress", "solve"]

Progress = Callable[[int, int, float, float], None]
"""Called with the meshes and batchings that are done, of how many, the best step time so far
(infinite before the first) and the bound, in seconds."""

MAX_CORRECTIONS = 3
MIN_TRIED = 20
MAX_SIMULATED = 8
NEAR = 1.03
"""The simulator may prefer a choice whose estimate is so much above the best: the step-time model
leaves out what transfers that meet lose to each other."""


def solve(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    progress: Progress | None = None,
) -> Solution:
    """The placement whose simulated step is shortest, with its certificate.

    It may use fewer devices than there are, where more would not help. A micro-batch size that the
    model cannot be traced with is left out, unless it is the only one.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: nothing fits in memory.
        TraceError: the model cannot be traced with any size, or the one that is demanded.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    sizes = Sizes(problem=problem, clock=clock)
    num_layers = sizes.count_layers()
    check_problem(problem, num_layers)
    space = batchings(problem, num_layers)
    search = _Search(
        problem=problem,
        simulate=simulate,
        clock=clock,
        sizes=sizes,
        num_layers=num_layers,
        progress=progress or (lambda *_: None),
    )
    search.branch(space)
    if is_small(problem, space, num_layers):
        search.go_through(space)
    return search.solution(search.best or search.rescue())


@dataclass(kw_only=True)
class _Search:
    problem: Problem
    simulate: Callable[[Placement], Simulated]
    clock: Clock
    sizes: Sizes
    num_layers: int
    progress: Progress
    builder: Builder = field(init=False)
    branches: Branches = field(init=False)
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    bound_seconds: float = 0.0
    margin_bytes: int = 0
    """Largest excess of a simulated peak over the memory model."""

    def __post_init__(self) -> None:
        self.builder = Builder(problem=self.problem)
        self.branches = Branches(
            problem=self.problem,
            num_layers=self.num_layers,
            sizes=self.sizes,
            builder=self.builder,
            rates=Rates(problem=self.problem),
        )

    @property
    def best_seconds(self) -> float:
        return self.best.step_seconds or math.inf if self.best else math.inf

    def branch(self, space: Sequence[Batching]) -> None:
        """The lowest bound first, until no bound is below the best or the clock ends it."""
        branches = self.branches
        branches.start(space)
        for leader in branches.leaders():
            if self._is_over():
                branches.put_back(leader)
            else:
                self._try(leader)
        # Splits that look good are simulated at once; the others wait for the end.
        while (node := branches.next(self.best_seconds)) is not None:
            if self._is_over():
                branches.put_back(node)
                break
            self._try(node)
            self._report(len(space))
        self._polish()
        self.bound_seconds = branches.bound_seconds
        self._report(len(space))

    def _is_over(self) -> bool:
        """Half of the time is for better splits of what has been found; with nothing found yet,
        some are tried whatever the clock says."""
        left = self.clock.left
        if self.best is None:
            return left <= 0 and len(self.branches.tried) > MIN_TRIED
        return left < self.clock.limit_seconds / 2

    def _report(self, total: int) -> None:
        done = total - self.branches.num_waiting
        bound = min(self.branches.bound_seconds, self.best_seconds)
        self.progress(done, total, self.best_seconds, bound)

    def _try(self, node: Node) -> None:
        found = self.branches.trials(node, self.best_seconds, self._is_over)
        self.trials += found
        fitting = [trial for trial in found if trial.split is not None]
        if fitting:
            first = min(fitting, key=lambda trial: trial.objective_seconds)
            if first.objective_seconds < self.best_seconds:
                self._simulate(first)

    def _polish(self) -> None:
        """Better splits of the choices that look best, and the simulator's word on them."""
        ranked = sorted(
            (trial for trial in self.trials if trial.split is not None),
            key=lambda trial: trial.objective_seconds,
        )
        chosen = ranked[:MAX_SIMULATED]
        for number, trial in enumerate(chosen):
            seconds = self.clock.left / 2 / (len(chosen) - number)
            if seconds > 0 and trial.bound_seconds < self.best_seconds:
                refine(trial, seconds, self.problem.seed)
        for trial in sorted(chosen, key=lambda trial: trial.objective_seconds):
            if self.best is not None and self.clock.left <= 0:
                break
            if trial.step_seconds is None and trial.objective_seconds < self.best_seconds * NEAR:
                self._simulate(trial)

    def _simulate(self, trial: Trial) -> None:
        """Simulate the trial's split; where its peak is above the memory model, split again."""
        for _ in range(MAX_CORRECTIONS):
            if trial.split is None:
                break
            simulated = self.simulate(trial.placement)
            if self._fits(trial, simulated):
                trial.step_seconds, trial.verdict = simulated.step_seconds, "simulated"
                if simulated.step_seconds < self.best_seconds:
                    self.best = trial
                return
            self._correct(trial, simulated)
        trial.split, trial.objective_seconds = None, math.inf
        trial.verdict = "infeasible: the simulated peak exceeds the memory limit"

    def _correct(self, trial: Trial, simulated: Simulated) -> None:
        assert trial.split is not None
        instance = trial.instance
        margins = excess_bytes(instance, trial.split, simulated.peak_bytes)
        self.margin_bytes = max(self.margin_bytes, *margins)
        trial.instance = with_margin(instance, margins)
        trial.split, trial.objective_seconds = None, math.inf
        trial.offer(sketch(trial.instance))

    def _fits(self, trial: Trial, simulated: Simulated) -> bool:
        return simulated.fits(self.builder.mesh_of(trial.instance.choice).limit_bytes)

    def go_through(self, space: Sequence[Batching]) -> None:
        """Every placement of a small space whose step-time model does not exceed the best."""
        accepted = [one for one in space if self.sizes.accepts(one.micro_batch_size)]
        everything = ranked(self.problem, accepted, self.num_layers, self.builder)
        for seconds, _, instance, split in everything:
            if seconds * CAREFUL >= self.best_seconds or self.clock.left <= 0:
                break
            trial = Trial(instance=instance, bound_seconds=seconds * CAREFUL, split=split)
            trial.objective_seconds = seconds
            simulated = self.simulate(trial.placement)
            if self._fits(trial, simulated):
                trial.step_seconds, trial.verdict = simulated.step_seconds, "simulated"
                if simulated.step_seconds < self.best_seconds:
                    self.best = trial
                    self.trials.append(trial)
        else:
            seconds = math.inf
        if accepted and is_chain(self.problem.graph_at(accepted[0].micro_batch_size)):
            self.bound_seconds = max(self.bound_seconds, seconds * CAREFUL)

    def solution(self, best: Trial) -> Solution:
        """The answer, with the simple splits beside it and the fate of every choice tried."""
        best.verdict = "best"
        choice, instance = best.instance.choice, best.instance
        uniform = self._baseline(best, uniform_split(instance.num_layers, choice.num_stages))
        greedy = self._baseline(best, greedy_split(instance.time, choice.num_stages))
        assert best.step_seconds is not None
        return Solution(
            placement=best.placement,
            step_seconds=best.step_seconds,
            objective_seconds=best.objective_seconds,
            bound_seconds=min(best.step_seconds, self.bound_seconds),
            solve_seconds=self.clock.spent,
            uniform_seconds=uniform,
            greedy_seconds=greedy,
            candidates=(
                *map(candidate_of, self.trials),
                *(self.sizes.candidate(self._plain(one)) for one in self.branches.refused),
            ),
        )

    def _plain(self, batching: Batching) -> Choice:
        """The first choice of a mesh and batching."""
        wanted = self.problem.constraints
        return choice_of(
            self.problem,
            batching,
            all_options(batching.num_replicas, wanted)[0],
            stages_per_rank=wanted.stages_per_rank or 1,
        )

    def _baseline(self, best: Trial, boundaries: tuple[int, ...]) -> float | None:
        """Simulated step of a simple split of the best choice, which it replaces if faster."""
        split = choose_recompute(best.instance, boundaries)
        if split == best.split:
            return best.step_seconds
        simulated = self.simulate(placement_of(best.instance.choice, split))
        if not self._fits(best, simulated):
            return None
        if simulated.step_seconds < self.best_seconds:
            best.split, best.step_seconds = split, simulated.step_seconds
            best.objective_seconds = step_ticks(best.instance, split) * best.instance.tick_seconds
        return simulated.step_seconds

    def rescue(self) -> Trial:
        """Where nothing has been found: of the splits that need least memory, the first that fits.

        Raises InfeasibleError, with the nearest miss, where none does.
        """
        self.sizes.raise_if_all_refused()
        lean = lean_splits(self.builder, self._instances())
        for instance, split in lean:
            if fits(instance, split):
                bound = least_step_ticks(instance) * instance.tick_seconds
                trial = Trial(instance=instance, bound_seconds=bound)
                trial.offer(split)
                self._simulate(trial)
                if self.best is trial:
                    self.trials.append(trial)
                    return trial
        raise explain(self.builder, *lean[0], self.margin_bytes)

    def _instances(self) -> list[Instance]:
        """Of the most devices that any choice uses."""
        groups = mesh_groups(self.problem, self.num_layers, accepts=self.sizes.accepts)
        return [
            self.builder.instance(choice)
            for choice in next(groups)
            if self.sizes.accepts(choice.micro_batch_size)
        ]
