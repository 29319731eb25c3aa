"""Search of the schedules that the solver has no model of: GPipe, 1F1B, interleaved and others.

Meshes and batches are the solver's. A model of the order's time and memory says which splits are
good and which choices come first; the simulator says what each takes. This module knows in what
order candidates are asked, and for how long.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from planner.errors import InfeasibleError
from planner.explain.candidates import Candidate, Kind, Mesh, candidates_of
from planner.explain.order_model import OrderModel, model_of, quick_seconds
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Simulated
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import Clock
from planner.solve.infeasible import format_bytes
from planner.solve.sizes import Sizes
from planner.solve.types import Split

__all__ = ["ScheduleSearch", "search_schedule"]

_MAX_SIMULATED = 32
"""Candidates."""
_MAX_CORRECTIONS = 3
_MAX_IMPROVED = 6
"""Of those that may lead, the first."""
_MAX_MOVES = 16
"""Single moves, since the last that was for the better."""
_MAY_LEAD = 1.03
"""What is so much slower than the best may still lead to the fastest by single moves."""
_NEARLY_FITS = 1.08
"""Peaks over the limit that another partition may bring below it."""
_NEAR = 1.15
"""First estimates so much above the best simulated step are not worth a split."""
_FAR = 1.5
"""Nor are those of simple splits worth a better one; where ranks differ it is much better."""
_NEARER = 1.03
"""The same of estimates of a good split, which are more often too low than too high."""
_MAX_WEIGHT = 2.0
"""Of a schedule's time, to that of others."""
_MOVES_SHARE = 0.3
"""Of the time limit, for single moves of the best."""


def search_schedule(
    problem: Problem, simulate: Callable[[Placement], Simulated], *schedules: Schedule
) -> tuple[Placement, float]:
    """The fastest placement under any of some schedules that fits in memory, and its simulated
    step.

    Placements that use all devices come first; fewer are used only if none of those fits.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: none fits, or none has the stages and micro-batches that it needs.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    search = ScheduleSearch(problem=problem, simulate=simulate, schedules=schedules)
    search.advance((1 - _MOVES_SHARE) * problem.time_limit_seconds)
    if search.best is None:
        search.advance(max(clock.left, 0) + problem.time_limit_seconds, only_until_found=True)
    search.improve(clock.left)
    if search.best is None:
        raise InfeasibleError(search.why_none())
    return search.best


_Entry = tuple[float, int, Candidate]
"""With its seconds as far as they are known, and a number that tells equal ones apart."""


@dataclass(slots=True, kw_only=True)
class _Queue:
    """A schedule's candidates, a heap."""

    waiting: list[_Entry] = field(default_factory=list)
    num_simulated: int = 0
    spent_seconds: float = 0.0
    least_seconds: float = math.inf
    """Of those that fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A placement that fits."""

    model: OrderModel
    split: Split
    placement: Placement
    step_seconds: float


@dataclass(slots=True, kw_only=True)
class ScheduleSearch:
    """A search that goes on where it was left, each time it is given more seconds.

    Raises UsageError where the demands contradict each other, the model or the cluster.
    """

    problem: Problem
    simulate: Callable[[Placement], Simulated]
    schedules: Sequence[Schedule]
    _builder: Builder = field(init=False)
    _clock: Clock = field(default_factory=lambda: Clock(limit_seconds=0.0))
    _turns: Iterator[None] = field(init=False)
    _twins: dict[Candidate, list[_Entry]] = field(default_factory=dict)
    """Heaps of candidates that differ in their partition alone, but for the first."""
    _found: dict[Candidate, _Found] = field(default_factory=dict)
    """The best of every candidate that fits, whatever its partition."""
    _least: float = math.inf
    """Seconds of the fastest plan known."""
    _num_fitting: int = 0
    """Candidates with a split that fits by the model."""
    _peak_ratios: dict[Kind, tuple[float, ...]] = field(default_factory=dict)
    """The least that simulations of this kind said of the model's memory; each candidate's own
    simulations say more."""
    _slowdowns: dict[Mesh, float] = field(default_factory=dict)
    """The least that simulations of this mesh took, over the model's seconds."""
    _nearest: tuple[int, int, str] | None = None
    """Bytes beyond the limit, pipeline rank and description of the nearest miss."""

    def __post_init__(self) -> None:
        self._builder = Builder(problem=self.problem)
        self._turns = self._walk()

    @property
    def best(self) -> tuple[Placement, float] | None:
        """The fastest placement so far, and its simulated step."""
        fastest = min(self._found.values(), key=lambda one: one.step_seconds, default=None)
        return None if fastest is None else (fastest.placement, fastest.step_seconds)

    def advance(
        self, seconds: float, *, faster_than: float = math.inf, only_until_found: bool = False
    ) -> None:
        """Search so long. What looks slower than the seconds `faster_than` of a plan that is known
        is not simulated. What tracing and profiling take is not counted."""
        self._clock.restart(seconds)
        self._least = min(self._least, faster_than)
        while self._clock.left > 0 and not (only_until_found and self._found):
            if next(self._turns, self) is self:
                return

    def improve(self, seconds: float) -> None:
        """Single moves of the best, for so long, that the simulator finds faster."""
        clock = Clock(limit_seconds=seconds)
        found = sorted(self._found.items(), key=lambda item: item[1].step_seconds)
        for candidate, one in found[:_MAX_IMPROVED]:
            if one.step_seconds <= _MAY_LEAD * found[0][1].step_seconds:
                self._found[candidate] = self._improved(one, clock)

    def why_none(self) -> str:
        """Of a search that has found nothing."""
        if self._nearest is None:
            names = " or ".join(schedule.value for schedule in self.schedules)
            return f"no mesh and batch go with the {names} schedule"
        excess, rank, words = self._nearest
        return f"out of memory by {format_bytes(excess)} on rank {rank} ({words})"

    def _walk(self) -> Iterator[None]:
        """A turn for each of the candidates that may be fastest. The schedule that has had the
        least time has the next."""
        sizes = Sizes(problem=self.problem, clock=self._clock)
        check_problem(self.problem, num_layers := len(sizes.any_graph().layers))
        for choices in mesh_groups(self.problem, num_layers, accepts=sizes.accepts):
            queues = self._queues([c for c in choices if sizes.accepts(c.micro_batch_size)])
            while waiting := [queue for queue in queues if queue.waiting]:
                queue = min(waiting, key=lambda queue: queue.spent_seconds / self._weight(queue))
                began = self._clock.spent
                self._turn(queue)
                queue.spent_seconds += self._clock.spent - began
                yield
            if self._num_fitting:
                return

    def _weight(self, queue: _Queue) -> float:
        """The schedule that leads has more of the time, and one that may take the lead by far."""
        leads, seconds = queue.least_seconds == self._least, queue.waiting[0][0]
        if leads or _MAX_WEIGHT * seconds <= self._least:
            return _MAX_WEIGHT
        return min(_MAX_WEIGHT, max(1 / _MAX_WEIGHT, (self._least / seconds) ** 4))

    def _turn(self, queue: _Queue) -> None:
        """Ask more about the candidate that looks fastest. A first estimate knows no memory, the
        second no order, that of a simple split no better ones; after each it waits for its turn
        again."""
        seconds, number, candidate = heapq.heappop(queue.waiting)
        if queue.num_simulated >= _MAX_SIMULATED:
            queue.waiting.clear()
        elif candidate.model is None:
            if seconds <= self._least * _NEAR:
                model = self._model_of(candidate)
                candidate = replace(candidate, model=model)
                heapq.heappush(queue.waiting, (model.quick_seconds(), number, candidate))
        elif candidate.split is None and seconds <= self._least * _NEAR:
            split, seconds = candidate.model.simple_split()
            heapq.heappush(queue.waiting, (seconds, number, replace(candidate, split=split)))
        elif candidate.split and not candidate.is_improved and seconds <= self._least * _FAR:
            self._try_to_fit(queue, number, candidate)
        elif candidate.is_improved and self._may_be_fast(seconds, candidate):
            queue.num_simulated += 1
            self._simulate(queue, candidate)
        else:
            self._push_twin(queue, candidate)

    def _may_be_fast(self, seconds: float, candidate: Candidate) -> bool:
        return seconds * self._slowdowns.get(candidate.mesh, 1.0) <= self._least * _NEARER

    def _try_to_fit(self, queue: _Queue, number: int, candidate: Candidate) -> None:
        assert candidate.model is not None
        assert candidate.split is not None
        split = candidate.model.improved(candidate.split)
        excess = candidate.model.excess_bytes(split)
        if max(excess) > 0:
            self._note_miss(excess, candidate.choice)
            self._push_twin(queue, candidate)
            return
        self._num_fitting += 1
        seconds = candidate.model.seconds(split)
        candidate = replace(candidate, split=split, is_improved=True)
        heapq.heappush(queue.waiting, (seconds, number, candidate))

    def _queues(self, choices: Sequence[Choice]) -> list[_Queue]:
        """A schedule's candidates each, by first estimates of their seconds. Of those that differ
        in their partition alone one waits, and the others for it to fail."""
        found = {schedule: _Queue() for schedule in self.schedules}
        self._twins.clear()
        instance_of = lru_cache(maxsize=1)(self._builder.instance)  # several schedules ask for it
        candidates = candidates_of(choices, self.schedules, self.problem)
        for number, candidate in enumerate(candidates):
            seconds = quick_seconds(instance_of(candidate.choice), candidate.schedule)
            entry = seconds, number, candidate
            self._twins.setdefault(candidate.unpartitioned, []).append(entry)
        for twins in self._twins.values():
            heapq.heapify(twins)
            self._push_twin(found[twins[0][2].schedule], twins[0][2])
        return list(found.values())

    def _push_twin(self, queue: _Queue, candidate: Candidate) -> None:
        if twins := self._twins[candidate.unpartitioned]:
            heapq.heappush(queue.waiting, heapq.heappop(twins))

    def _model_of(self, candidate: Candidate) -> OrderModel:
        return model_of(
            self._builder, candidate.choice, candidate.schedule, candidate.group_size,
            self._peak_ratios.get(candidate.kind, ()),
        )  # fmt: skip

    def _simulate(self, queue: _Queue, candidate: Candidate) -> None:
        """Take the fastest that fits. Another partition may fit too, or keep what this one
        recomputes."""
        found = min(self._fitting(candidate), key=lambda one: one.step_seconds, default=None)
        if found is None or any(found.split.recompute):
            self._push_twin(queue, candidate)
        if found is not None:
            key = candidate.unpartitioned
            if key not in self._found or found.step_seconds < self._found[key].step_seconds:
                self._found[key] = found
            queue.least_seconds = min(queue.least_seconds, found.step_seconds)
            self._least = min(self._least, found.step_seconds)

    def _fitting(self, candidate: Candidate) -> Iterator[_Found]:
        """What fits of splits by the model, with ever better knowledge of memory."""
        model, split, choice = candidate.model, candidate.split, candidate.choice
        assert model is not None
        assert split is not None
        limits = self._builder.mesh_of(choice).limit_bytes
        tried = set()
        for _ in range(_MAX_CORRECTIONS):
            tried.add(split)
            placement, simulated = self._leanest(model, split)
            self._note_slowdown(candidate.mesh, simulated.step_seconds, model.seconds(split))
            if simulated.fits(limits):
                seconds = simulated.step_seconds
                yield _Found(model=model, split=split, placement=placement, step_seconds=seconds)
                if not any(split.recompute):
                    return
            else:
                pairs = zip(simulated.peak_bytes, limits, strict=True)
                self._note_miss([peak - limit for peak, limit in pairs], choice)
            model = model.corrected(split, simulated.peak_bytes)
            known = self._peak_ratios.get(candidate.kind, model.peak_ratios)
            self._peak_ratios[candidate.kind] = tuple(map(min, known, model.peak_ratios))
            split = model.improved(model.simple_split(split)[0])
            if split in tried or max(model.excess_bytes(split)) > 0:
                return

    def _improved(self, found: _Found, clock: Clock) -> _Found:
        """With single moves that the simulator finds faster; the model says which are tried."""
        limits = self._builder.mesh_of(found.model.choice).limit_bytes
        tried, num_left = {found.split}, _MAX_MOVES
        moves = iter(found.model.near(found.split, _MAY_LEAD))
        while num_left and clock.left > 0:
            split = next((split for split in moves if split not in tried), None)
            if split is None:
                break
            tried.add(split)
            num_left -= 1
            cuts, flags = split.boundaries, split.recompute
            placement = replace(found.placement, boundaries=cuts, recompute=flags)
            simulated = self.simulate(placement)
            if simulated.fits(limits) and simulated.step_seconds < found.step_seconds:
                seconds, num_left = simulated.step_seconds, _MAX_MOVES
                found = replace(found, split=split, placement=placement, step_seconds=seconds)
                moves = iter(found.model.near(split, _MAY_LEAD))
        return found

    def _leanest(self, model: OrderModel, split: Split) -> tuple[Placement, Simulated]:
        """The first number of buffers that fits, or else, where it nearly fits, the first partition
        beside the choice's own; the last that was tried where none does."""
        limits = self._builder.mesh_of(model.choice).limit_bytes
        for placement in self._placements(model, split):
            simulated = self.simulate(placement)
            if simulated.fits(limits):
                return placement, simulated
        pairs = zip(simulated.peak_bytes, limits, strict=True)
        if all(peak <= _NEARLY_FITS * limit for peak, limit in pairs):
            for level in self._other_levels(model.choice):
                other = replace(placement, partition=level)
                if (found := self.simulate(other)).fits(limits):
                    return other, found
        return placement, simulated

    def _other_levels(self, choice: Choice) -> range:
        is_free = self.problem.constraints.partition is None
        return range(choice.partition - 1, 0, -1) if is_free else range(0)

    def _placements(self, model: OrderModel, split: Split) -> Iterator[Placement]:
        """With buffers for all of a rank's stages, as alternating orders come back to each of them;
        and with fewer, where the weights are gathered for each stay. As many as are demanded."""
        placement = model.placement(split)
        sizes = [placement.num_weight_buffers]
        if self.problem.constraints.num_buffers is None:
            sizes.insert(0, model.choice.stages_per_rank)
        for size in dict.fromkeys(sizes):
            yield replace(placement, num_weight_buffers=size, num_gradient_buffers=size)

    def _note_slowdown(self, mesh: Mesh, seconds: float, estimated: float) -> None:
        if estimated > 0:
            ratio = seconds / estimated
            self._slowdowns[mesh] = min(ratio, self._slowdowns.get(mesh, ratio))

    def _note_miss(self, excess_bytes: Sequence[int], choice: Choice) -> None:
        excess = max(excess_bytes)
        if self._nearest is None or excess < self._nearest[0]:
            self._nearest = excess, excess_bytes.index(excess), choice.describe()
