"""The search: small spaces in full, large ones by branch and bound; the simulator is the judge.

This module knows the order of the steps and the clock. What a choice costs, how it is split and
what it takes in memory is known elsewhere.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.solve.assign import WORTH, assigned_trials, may_assign
from planner.solve.bounds import least_step_ticks
from planner.solve.branch import Branches, Node
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import Clock, placement_of
from planner.solve.exact import CAREFUL, is_chain, is_small, ranked
from planner.solve.infeasible import excess_bytes, explain, lean_splits, with_margin
from planner.solve.instance import Instance, step_ticks
from planner.solve.plainer import TIE, plainer
from planner.solve.polish import Polish
from planner.solve.problem import Problem, Simulated
from planner.solve.rates import Rates
from planner.solve.recompute import choose_recompute
from planner.solve.shake import search_nearby
from planner.solve.sizes import Sizes
from planner.solve.sketch import sketch
from planner.solve.space import Batching, all_options, batchings, choice_of
from planner.solve.splits import fits, greedy_split, uniform_split
from planner.solve.trial import Best, Trial, candidate_of
from planner.solve.types import Placement, Solution

__all__ = ["Progress", "solve"]

Progress = Callable[[int, int, float, float], None]
"""Called with the meshes and batchings that are done, of how many, the best step time so far
(infinite before the first) and the bound, in seconds."""

Offload = tuple[int, int, int, bool, bool]
"""Replicas, pipeline ranks, partition, and whether state and inputs are offloaded."""
MAX_CORRECTIONS = 3
MIN_TRIED = 20
MAX_SIMULATED = 8
LEAST_ASSIGN_SHARE = 1 / 20
"""Of the time limit, for stages on other ranks."""
FAR = 1.05
"""Better splits seldom gain more."""
FAR_SHARE = 0.2
"""Of the time limit, for better splits of what is so far behind the rival."""
NEAR = 1.03
"""The simulator may prefer a choice whose estimate is so much above the best: the step-time model
leaves out what transfers that meet lose to each other."""


def solve(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    progress: Progress | None = None,
    *,
    rival_seconds: float = math.inf,
) -> Solution:
    """The placement whose simulated step is shortest, with its certificate.

    With the `rival_seconds` of a plan that is no answer but will be taken instead where it is
    faster, the search is over once nothing can be as fast, and shorter where it is far behind.

    It may use fewer devices than there are, where more would not help. A micro-batch size that the
    model cannot be traced with is left out, unless it is the only one.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: nothing fits in memory.
        TraceError: the model cannot be traced with any size, or the one that is demanded.
        KeyboardInterrupt: interrupted before anything was found; later, the best so far is
            returned with its gap.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    sizes = Sizes(problem=problem, clock=clock)
    num_layers = len(sizes.any_graph().layers)
    check_problem(problem, num_layers)
    space = batchings(problem, num_layers)
    search = _Search(
        problem=problem,
        simulate=simulate,
        clock=clock,
        sizes=sizes,
        num_layers=num_layers,
        progress=progress or (lambda *_: None),
        rival_seconds=rival_seconds,
    )
    try:
        search.branch(space)
        if is_small(problem, space, num_layers):
            search.go_through(space)
        if search.best is None:
            search.rescue(space)
        search.simplify()
        search.assign(space)
    except KeyboardInterrupt:
        search.interrupt()
    return search.solution()


@dataclass(kw_only=True)
class _Search:
    problem: Problem
    simulate: Callable[[Placement], Simulated]
    clock: Clock
    sizes: Sizes
    num_layers: int
    progress: Progress
    rival_seconds: float = math.inf
    builder: Builder = field(init=False)
    branches: Branches = field(init=False)
    trials: list[Trial] = field(default_factory=list)
    best: Best | None = None
    modular: Best | None = None
    """With stage s on rank s mod P, where the best has its stages on other ranks."""
    bound_seconds: float = 0.0
    is_interrupted: bool = False
    lacking: set[Offload] = field(default_factory=set)
    """What some host has been found to lack memory for."""
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
        return self.best.step_seconds if self.best else math.inf

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
        if self.rival_seconds * FAR < self.best_seconds < math.inf:
            limit = self.clock.limit_seconds
            self.clock.limit_seconds = min(limit, self.clock.spent + FAR_SHARE * limit)
        self._polish()
        self.bound_seconds = branches.bound_seconds
        self._report(len(space))

    def _is_over(self) -> bool:
        """Half of the time is for better splits of what has been found; with nothing found yet,
        some are tried whatever the clock says."""
        left = self.clock.left
        if self.best is None:
            return left <= 0 and len(self.branches.tried) > MIN_TRIED
        if self.rival_seconds < math.inf and self.branches.bound_seconds >= self.rival_seconds:
            return True
        return left < self.clock.limit_seconds / 2

    def _report(self, total: int) -> None:
        done = total - self.branches.num_waiting
        bound = min(self.branches.bound_seconds, self.best_seconds)
        self.progress(done, total, self.best_seconds, bound)

    def _try(self, node: Node) -> None:
        found = self.branches.trials(node, self.best_seconds, self._is_over)
        self.trials += found
        fitting = [trial for trial in found if trial.split is not None]
        for trial in sorted(fitting, key=lambda trial: trial.objective_seconds):
            if trial.objective_seconds < self.best_seconds:
                self._simulate(trial)
            if self._offload_of(trial) not in self.lacking:
                break

    def _polish(self) -> None:
        """Better splits of the choices that look best, and the simulator's word on them."""
        polish = Polish(
            trials=self.trials,
            try_choice=self.branches.trial,
            wanted=self.problem.constraints,
            num_layers=self.num_layers,
            clock=self.clock,
            seed=self.problem.seed,
        )
        polish.search_locally()
        # What does not fit by the simulator is split again, before more is made of it.
        self._simulate_best(polish.leaders())
        polish.search_on()
        self._simulate_best(polish.leaders())
        self._simulate_best(polish.ranked())

    def _simulate_best(self, trials: Sequence[Trial]) -> None:
        """Those that look best, as long as there is time."""
        for trial in trials[:MAX_SIMULATED]:
            if self.best is not None and self.clock.left <= 0:
                break
            if trial.step_seconds is None and trial.objective_seconds < self.best_seconds * NEAR:
                self._simulate(trial)

    def _simulate(self, trial: Trial) -> None:
        """Simulate the trial's split; where its peak is above the memory model, split again. What
        hosts lack memory for no split mends."""
        for _ in range(MAX_CORRECTIONS):
            if trial.split is None or self._offload_of(trial) in self.lacking:
                break
            simulated = self.simulate(trial.placement)
            if self._fits(trial, simulated):
                self._take(trial, simulated.step_seconds)
                return
            if simulated.host_lack_bytes:
                self.lacking.add(self._offload_of(trial))
            else:
                self._correct(trial, simulated)
        trial.split, trial.objective_seconds = None, math.inf
        trial.verdict = "infeasible: the simulated peak exceeds the memory limit"
        if self._offload_of(trial) in self.lacking:
            trial.verdict = "infeasible: a host lacks memory for what is offloaded"

    def _offload_of(self, trial: Trial) -> Offload:
        choice = trial.instance.choice
        mesh = choice.num_replicas, choice.num_pipeline_ranks
        return *mesh, choice.partition, choice.offload_state, choice.offload_inputs

    def _take(self, trial: Trial, step_seconds: float) -> None:
        """What the simulator has found to fit; the best so far if it is faster."""
        trial.step_seconds, trial.verdict = step_seconds, "simulated"
        if step_seconds < self.best_seconds:
            self.best = Best.of(trial)

    def _correct(self, trial: Trial, simulated: Simulated) -> None:
        assert trial.split is not None
        instance, boundaries = trial.instance, trial.split.boundaries
        margins = excess_bytes(instance, trial.split, simulated.peak_bytes)
        self.margin_bytes = max(self.margin_bytes, *margins)
        trial.instance = with_margin(instance, margins)
        trial.split, trial.objective_seconds = None, math.inf
        again = choose_recompute(trial.instance, boundaries)
        trial.offer(again if fits(trial.instance, again) else None)
        trial.offer(sketch(trial.instance))
        search_nearby(trial)

    def _fits(self, trial: Trial, simulated: Simulated) -> bool:
        return simulated.fits(self.builder.mesh_of(trial.instance.choice).limit_bytes)

    def go_through(self, space: Sequence[Batching], *, modular: bool = True) -> None:
        """Every placement of a small space whose step-time model does not exceed the best: with
        stage s on rank s mod P, or with stages on any other ranks."""
        accepted = [one for one in space if self.sizes.accepts(one.micro_batch_size)]
        faster_than = math.inf if modular else self.best_seconds
        everything = ranked(
            self.problem, accepted, self.num_layers, self.builder,
            modular=modular, faster_than=faster_than,
        )  # fmt: skip
        for seconds, _, instance, split in everything:
            if seconds * CAREFUL >= self.best_seconds or self.clock.left <= 0:
                break
            trial = Trial(instance=instance, bound_seconds=seconds * CAREFUL, split=split)
            trial.objective_seconds = seconds
            simulated = self.simulate(trial.placement)
            if self._fits(trial, simulated):
                self._take(trial, simulated.step_seconds)
                if self.best is not None and self.best.trial is trial:
                    self.trials.append(trial)
        else:
            seconds = math.inf
        if modular and accepted and is_chain(self.problem.graph_at(accepted[0].micro_batch_size)):
            self.bound_seconds = max(self.bound_seconds, seconds * CAREFUL)

    def simplify(self) -> None:
        """Of placements that are equally fast, the plainer: while one of the plainer choices takes
        no longer than the best, it becomes the best."""
        while self.best is not None and self.clock.left > 0:
            for trial in plainer(self.best, self.builder, self.problem.constraints):
                simulated = self.simulate(trial.placement)
                seconds = simulated.step_seconds
                if seconds <= self.best.step_seconds * TIE and self._fits(trial, simulated):
                    trial.step_seconds, trial.verdict = seconds, "simulated"
                    self.best = Best.of(trial)
                    self.trials.append(trial)
                    break
            else:
                return

    def assign(self, space: Sequence[Batching]) -> None:
        """Stages on other ranks than s mod P, where that is faster."""
        is_done = self.best is not None and self.best.instance.choice.assignment
        if is_done or not may_assign(self.problem.constraints):
            return
        self.modular, least_gain = self.best, 1 / TIE
        if is_small(self.problem, space, self.num_layers, modular=False):
            self.go_through(space, modular=False)
        elif self.best is not None:
            least_gain = WORTH
            # A little time is for this, however much the rest has taken.
            least = self.clock.limit_seconds * LEAST_ASSIGN_SHARE
            clock = Clock(limit_seconds=max(self.clock.left, least))
            for trial in assigned_trials(self.builder, self.trials, self.best_seconds, clock):
                if clock.left > 0 and trial.objective_seconds < self.best_seconds:
                    self.trials.append(trial)
                    self._simulate(trial)
        if self.modular and self.best_seconds >= self.modular.step_seconds * least_gain:
            self.best = self.modular

    def interrupt(self) -> None:
        """Leave it at the best so far.

        Raises KeyboardInterrupt if there is none.
        """
        if self.best is None:
            raise KeyboardInterrupt
        self.is_interrupted = True
        self.bound_seconds = max(self.bound_seconds, self.branches.bound_seconds)

    def solution(self) -> Solution:
        """The answer, with the simple splits beside it and the fate of every choice tried."""
        assert self.best is not None
        choice, instance = self.best.instance.choice, self.best.instance
        uniform = self._baseline(uniform_split(instance.num_layers, choice.num_stages))
        greedy = self._baseline(greedy_split(instance.time, choice.num_stages))
        best, modular = self.best, self.modular
        is_assigned = bool(best.instance.choice.assignment)
        certified = modular if is_assigned and modular is not None else best
        bound = 0.0 if is_assigned and modular is None else self.bound_seconds
        return Solution(
            placement=best.placement,
            step_seconds=best.step_seconds,
            objective_seconds=certified.objective_seconds,
            bound_seconds=min(certified.step_seconds, bound),
            modular_seconds=None if certified is best else certified.step_seconds,
            solve_seconds=self.clock.spent,
            uniform_seconds=uniform,
            greedy_seconds=greedy,
            candidates=(
                best.candidate(),
                *(candidate_of(trial) for trial in self.trials if trial is not best.trial),
                *(self.sizes.candidate(self._plain(one)) for one in self.branches.refused),
            ),
            is_interrupted=self.is_interrupted,
        )

    def _plain(self, batching: Batching) -> Choice:
        """The first choice of a mesh and batching."""
        wanted = self.problem.constraints
        return choice_of(
            self.problem,
            batching,
            all_options(self.problem, batching)[0],
            stages_per_rank=wanted.stages_per_rank or 1,
        )

    def _baseline(self, boundaries: tuple[int, ...]) -> float | None:
        """Simulated step of a simple split of the best choice, which it replaces if faster. When
        the time is up, the step-time model's word on one that is clearly slower."""
        assert self.best is not None
        best, split = self.best, choose_recompute(self.best.instance, boundaries)
        if split == best.split:
            return best.step_seconds
        estimate = step_ticks(best.instance, split) * best.instance.tick_seconds
        if self.clock.left <= 0 and estimate > best.objective_seconds * NEAR:
            # To simulate a large plan takes long, and this one is not in question.
            return estimate if fits(best.instance, split) else None
        simulated = self.simulate(placement_of(best.instance.choice, split))
        if not self._fits(best.trial, simulated):
            return None
        if simulated.step_seconds < best.step_seconds:
            self.best = dataclasses.replace(
                best,
                split=split,
                step_seconds=simulated.step_seconds,
                objective_seconds=estimate,
            )
        return simulated.step_seconds

    def rescue(self, space: Sequence[Batching]) -> None:
        """Where nothing has been found: of the splits that need least memory, the first that fits,
        and then better ones of its choice.

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
                if self.best is not None:
                    self.trials.append(trial)
                    self._polish()
                    return
        self.assign(space)
        if self.best is not None:
            return
        raise explain(self.builder, *lean[0], self.margin_bytes)

    def _instances(self) -> list[Instance]:
        """Of the most devices that any choice uses."""
        groups = mesh_groups(self.problem, self.num_layers, accepts=self.sizes.accepts)
        return [
            self.builder.instance(choice)
            for choice in next(groups)
            if self.sizes.accepts(choice.micro_batch_size)
        ]
