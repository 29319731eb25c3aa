"""Search of the schedules that the solver has no model of: GPipe, 1F1B, interleaved and others.

Meshes, batches and splits are the solver's. Its step-time model, which is that of the layered
order, says which come first; how many micro-batches a rank holds at once says which may fit; the
simulator says what each takes. This module knows what a schedule asks of a placement.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from planner.errors import InfeasibleError
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Simulated
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import Clock, placement_of
from planner.solve.infeasible import format_bytes
from planner.solve.instance import Instance, rank_units, step_ticks
from planner.solve.sizes import Sizes
from planner.solve.splits import balanced_split, greedy_split, uniform_split, warm_start
from planner.solve.types import Split

__all__ = ["hybrid_group_sizes", "search_schedule"]

_LOOPED = (Schedule.INTERLEAVED, Schedule.HYBRID)
"""Schedules for several stages per rank."""
_MAX_SIMULATED = 12
"""Candidates."""
_MAX_IMPROVED = 2
_MAX_SEARCHED_STAGES = 24
_MAX_CORRECTIONS = 3
_NUM_BUFFERS = 2
_MAX_LOOPS = 8
"""Stages per rank: more shorten the bubble little and hold more micro-batches."""
_NEAR = 1.15
"""Estimates so much above the best simulated step are not worth a simulation."""
_MEMORY_TOLERANCE = 1.1
"""Of the estimate of memory: what is beyond it is not simulated."""
_SEARCH_EFFORT = 300
_MAY_KEEP = 0.5
"""Of a rank's limit: where the estimate of memory is no more above it, recomputing nothing is
simulated all the same, for the estimate knows no order."""


def search_schedule(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    schedule: Schedule,
    *,
    faster_than: float | None = None,
) -> tuple[Placement, float]:
    """The fastest placement under a schedule that fits in memory, and its simulated step.

    Placements that use all devices come first; fewer are used only if none of those fits. What
    looks slower than the seconds `faster_than` is not simulated.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: none fits, or none has the stages and micro-batches that it needs.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    sizes = Sizes(problem=problem, clock=clock)
    check_problem(problem, num_layers := sizes.count_layers())
    search = _Search(
        problem=problem,
        simulate=simulate,
        schedule=schedule,
        clock=clock,
        faster_than=math.inf if faster_than is None else faster_than,
    )
    for choices in mesh_groups(problem, num_layers, accepts=sizes.accepts):
        accepted = [c for c in choices if sizes.accepts(c.micro_batch_size)]
        found = search.best_of(accepted)
        if found is not None:
            return found
        if clock.left <= 0:
            break
    raise InfeasibleError(search.why_none())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A choice, and what the solver's models say of it."""

    instance: Instance
    group_size: int
    estimate_seconds: float
    split: Split | None = None
    """One that fits by the estimate of memory, once it is asked for."""
    may_keep: bool = False
    """Where it recomputes: without that it may fit, for all the estimate says."""

    @property
    def choice(self) -> Choice:
        return self.instance.choice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A candidate with a placement that fits."""

    candidate: _Candidate
    placement: Placement
    step_seconds: float


@dataclass(slots=True, kw_only=True)
class _Search:
    problem: Problem
    simulate: Callable[[Placement], Simulated]
    schedule: Schedule
    clock: Clock
    faster_than: float
    builder: Builder = field(init=False)
    nearest: tuple[int, int, str] | None = None
    """Bytes beyond the limit, pipeline rank and description of the nearest miss."""

    def __post_init__(self) -> None:
        self.builder = Builder(problem=self.problem)

    def best_of(self, choices: Sequence[Choice]) -> tuple[Placement, float] | None:
        """The best of the choices under this schedule; None if none fits."""
        found = list(self._simulated(choices))
        found.sort(key=lambda other: other.step_seconds)
        found += [self._improved(other) for other in found[:_MAX_IMPROVED]]
        best = min(found, key=lambda other: other.step_seconds, default=None)
        return None if best is None else (best.placement, best.step_seconds)

    def why_none(self) -> str:
        """Of a search that has found nothing."""
        if self.nearest is None:
            return f"no mesh and batch go with the {self.schedule.value} schedule"
        excess, rank, words = self.nearest
        return f"out of memory by {format_bytes(excess)} on rank {rank} ({words})"

    def _simulated(self, choices: Sequence[Choice]) -> Iterator[_Found]:
        """Of the candidates that may be fastest, those that fit. An estimate that memory has not
        been asked about is too low, so such candidates are asked and wait for their turn again."""
        heap = [(c.estimate_seconds, n, c) for n, c in enumerate(self._candidates(choices))]
        heapq.heapify(heap)
        least, num_simulated = self.faster_than, 0
        while heap:
            seconds, number, candidate = heapq.heappop(heap)
            is_late = num_simulated >= _MAX_SIMULATED or self.clock.left <= 0
            if seconds > least * _NEAR or (is_late and least < math.inf):
                return
            if self.clock.left <= -self.clock.limit_seconds:
                return
            if candidate.split is None:
                fitting = self._with_fitting_split(candidate)
                if fitting is not None and fitting.split is not None:
                    ticks = step_ticks(fitting.instance, fitting.split)
                    if not fitting.may_keep:
                        seconds = max(seconds, ticks * fitting.instance.tick_seconds)
                    heapq.heappush(heap, (seconds, number, fitting))
                continue
            num_simulated += 1
            for found in self._first_that_fits(candidate, candidate.split):
                least = min(least, found.step_seconds)
                yield found

    def _candidates(self, choices: Sequence[Choice]) -> Iterator[_Candidate]:
        """With the split that is balanced in time."""
        demanded = self.problem.constraints.recompute or False
        plain = {
            replace(
                choice, recompute=demanded, offload_state=False, offload_inputs=False,
                num_buffers=self.problem.constraints.num_buffers or _NUM_BUFFERS,
            )
            for choice in choices
        }  # fmt: skip
        for choice in sorted(plain):
            groups = _group_sizes(self.schedule, choice)
            if not groups:
                continue
            instance = self.builder.instance(choice)
            split = choice.split(balanced_split(instance.time, choice.num_stages))
            seconds = step_ticks(instance, split) * instance.tick_seconds
            for group_size in groups:
                yield _Candidate(instance=instance, group_size=group_size, estimate_seconds=seconds)

    def _with_fitting_split(self, candidate: _Candidate) -> _Candidate | None:
        """Balanced in time, or else in memory, with recompute on the ranks that need it; None if
        none fits by the memory model, with as many micro-batches as the schedule holds at once."""
        choice, misses = candidate.choice, []
        may_choose = self.problem.constraints.recompute is None
        for prefix in (candidate.instance.time, candidate.instance.kept):
            split = choice.split(balanced_split(prefix, choice.num_stages))
            excess, may_keep = self._excess(candidate, choice, split), False
            if may_choose and max(excess) > 0:
                limits = self.builder.mesh_of(choice).limit_bytes
                pairs = zip(excess, limits, strict=True)
                may_keep = all(more <= _MAY_KEEP * limit for more, limit in pairs)
                again = self._excess(candidate, replace(choice, recompute=True), split)
                flags = tuple(
                    excess[stage % choice.num_pipeline_ranks] > 0
                    for stage in range(choice.num_stages)
                )
                split = replace(split, recompute=flags)
                excess = [min(pair) for pair in zip(excess, again, strict=True)]
            if max(excess) <= 0:
                return replace(candidate, split=split, may_keep=may_keep)
            misses.append((max(excess), excess.index(max(excess))))
        self._note_miss(*min(misses), choice)
        return None

    def _excess(self, candidate: _Candidate, choice: Choice, split: Split) -> list[int]:
        """Bytes beyond the limit of each rank, all stages recomputed or none, as the choice says.

        Memory is linear in the micro-batches held, so two numbers of them tell of any.
        """
        split = choice.split(split.boundaries)
        every = self.builder.instance(choice)
        one = self.builder.instance(replace(choice, num_micro_batches=1))
        more = max(1, choice.num_micro_batches - 1)
        ones, all_units = rank_units(one, split), rank_units(every, split)
        found = []
        for rank, limit in enumerate(self.builder.mesh_of(choice).limit_bytes):
            share = (_num_held(self.schedule, candidate, rank) - 1) / more
            least, most = ones[rank] * one.unit_bytes, all_units[rank] * every.unit_bytes
            held = least + share * (most - least)
            found.append(round(held / _MEMORY_TOLERANCE - limit))
        return found

    def _first_that_fits(self, candidate: _Candidate, split: Split) -> Iterator[_Found]:
        """With as many buffers as fit, and where none do, with recompute on the ranks that lack
        memory as well."""
        limits = self.builder.mesh_of(candidate.choice).limit_bytes
        may_choose = self.problem.constraints.recompute is None
        if candidate.may_keep:
            nothing = replace(split, recompute=(False,) * len(split.recompute))
            placement, simulated = self._leanest(candidate, nothing)
            if simulated.fits(limits):
                yield _found(candidate, placement, simulated)
                return
        for _ in range(_MAX_CORRECTIONS if may_choose else 1):
            placement, simulated = self._leanest(candidate, split)
            if simulated.fits(limits):
                yield _found(candidate, placement, simulated)
                return
            excess = [peak - most for peak, most in zip(simulated.peak_bytes, limits, strict=True)]
            self._note_miss(max(excess), excess.index(max(excess)), candidate.choice)
            flags = tuple(
                again or excess[rank] > 0
                for again, rank in zip(split.recompute, placement.stage_ranks, strict=True)
            )
            if flags == split.recompute:
                return
            split = replace(split, recompute=flags)

    def _leanest(self, candidate: _Candidate, split: Split) -> tuple[Placement, Simulated]:
        """The first number of buffers that fits, or the last."""
        limits = self.builder.mesh_of(candidate.choice).limit_bytes
        for placement in self._placements(candidate, split):
            simulated = self.simulate(placement)
            if simulated.fits(limits):
                break
        return placement, simulated

    def _placements(self, candidate: _Candidate, split: Split) -> Iterator[Placement]:
        """With buffers for all of a rank's stages, as alternating orders come back to each of them;
        and with fewer, where the weights are gathered for each stay. As many as are demanded."""
        placement = replace(
            placement_of(candidate.choice, split),
            schedule=self.schedule,
            group_size=candidate.group_size,
        )
        sizes = [placement.num_weight_buffers]
        if self.problem.constraints.num_buffers is None:
            sizes.insert(0, candidate.choice.stages_per_rank)
        for size in dict.fromkeys(sizes):
            yield replace(placement, num_weight_buffers=size, num_gradient_buffers=size)

    def _improved(self, found: _Found) -> _Found:
        """With other boundaries, if those are faster."""
        candidate = found.candidate
        limits = self.builder.mesh_of(candidate.choice).limit_bytes
        for boundaries in dict.fromkeys(_other_splits(candidate.instance)):
            if self.clock.left <= 0:
                break
            placement = replace(found.placement, boundaries=boundaries)
            simulated = self.simulate(placement)
            if simulated.fits(limits) and simulated.step_seconds < found.step_seconds:
                found = replace(found, placement=placement, step_seconds=simulated.step_seconds)
        return found

    def _note_miss(self, excess: int, rank: int, choice: Choice) -> None:
        if self.nearest is None or excess < self.nearest[0]:
            self.nearest = excess, rank, choice.describe()


def _found(candidate: _Candidate, placement: Placement, simulated: Simulated) -> _Found:
    return _Found(candidate=candidate, placement=placement, step_seconds=simulated.step_seconds)


def _other_splits(instance: Instance) -> Iterator[tuple[int, ...]]:
    """What a local search under the step-time model finds, where that is quick, and simple ones."""
    stages = instance.choice.num_stages
    if stages <= _MAX_SEARCHED_STAGES:
        yield warm_start(instance, _SEARCH_EFFORT).boundaries
    yield balanced_split(instance.time, stages)
    yield greedy_split(instance.time, stages)
    yield uniform_split(instance.num_layers, stages)


def _group_sizes(schedule: Schedule, choice: Choice) -> tuple[int, ...]:
    """Of the hybrid schedule, 0 for others; none where the schedule does not go with the choice."""
    ranks, loops, count = (
        choice.num_pipeline_ranks, choice.stages_per_rank, choice.num_micro_batches
    )  # fmt: skip
    if schedule is Schedule.PLAIN:
        return (0,) if ranks == 1 else ()
    if ranks == 1:
        return ()
    if schedule not in _LOOPED:
        return (0,) if loops == 1 else ()
    if not 1 < loops <= _MAX_LOOPS:
        return ()
    if schedule is Schedule.INTERLEAVED:
        return () if count % ranks else (0,)
    return hybrid_group_sizes(ranks, count)


def hybrid_group_sizes(ranks: int, count: int) -> tuple[int, ...]:
    """Micro-batches that pass through a stage together, which the hybrid schedule is tried with."""
    sizes = dict.fromkeys((2 * ranks, -(-count // 2), count))
    return tuple(size for size in sizes if ranks < size <= count and not 0 < count % size < ranks)


def _num_held(schedule: Schedule, candidate: _Candidate, rank: int) -> float:
    """Micro-batches, through all of a rank's stages, whose activations it holds at once."""
    choice = candidate.choice
    ranks, loops, count = (
        choice.num_pipeline_ranks, choice.stages_per_rank, choice.num_micro_batches
    )  # fmt: skip
    match schedule:
        case Schedule.PLAIN:
            held = 1.0
        case Schedule.ONE_F_ONE_B:
            held = ranks - rank
        case Schedule.ZERO_BUBBLE:
            held = ranks
        case Schedule.INTERLEAVED | Schedule.HYBRID:
            group = candidate.group_size or ranks
            held = (2 * (ranks - rank - 1) + (loops - 1) * group + 1) / loops
        case _:
            held = count
    return max(1.0, min(held, count))
