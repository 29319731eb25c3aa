"""Search of the schedules that the solver has no model of: GPipe, 1F1B, interleaved and others.

Meshes and batches are the solver's. A model of the order's time and memory says which splits are
good and which choices come first; the simulator says what each takes. This module knows what a
schedule asks of a placement.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from planner.errors import InfeasibleError
from planner.explain.order_model import OrderModel, model_of, quick_seconds
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Simulated
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem, mesh_groups
from planner.solve.entry import Clock
from planner.solve.infeasible import format_bytes
from planner.solve.sizes import Sizes
from planner.solve.types import Split

__all__ = ["hybrid_group_sizes", "search_schedule"]

_LOOPED = (Schedule.INTERLEAVED, Schedule.HYBRID)
"""Schedules for several stages per rank."""
_MAX_SIMULATED = 12
"""Candidates."""
_MAX_CORRECTIONS = 3
_MAX_IMPROVED = 2
_MAX_MOVES = 24
_MAY_LEAD = 1.03
"""What is so much slower than the best may still lead to the fastest by single moves."""
_NUM_BUFFERS = 2
_MAX_LOOPS = 8
"""Stages per rank: more shorten the bubble little and hold more micro-batches."""
_NEAR = 1.15
"""First estimates so much above the best simulated step are not worth a split."""
_NEARER = 1.03
"""The same of estimates of a split, which are more often too low than too high."""
_MOVES_SHARE = 0.3
"""Of the time limit, for single moves of the best."""
_Kind = tuple[Schedule, int, int, int]
"""Of candidates whose memory is estimated alike: schedule, mesh and micro-batch size."""


def search_schedule(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    *schedules: Schedule,
    faster_than: float | None = None,
) -> tuple[Placement, float]:
    """The fastest placement under any of some schedules that fits in memory, and its simulated
    step.

    Placements that use all devices come first; fewer are used only if none of those fits. What
    looks slower than the seconds `faster_than` of a plan that is known is not simulated.

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        InfeasibleError: none fits, or none has the stages and micro-batches that it needs.
    """
    clock = Clock(limit_seconds=problem.time_limit_seconds)
    sizes = Sizes(problem=problem, clock=clock)
    check_problem(problem, num_layers := len(sizes.any_graph().layers))
    search = _Search(
        problem=problem,
        simulate=simulate,
        schedules=schedules,
        clock=clock,
        least=math.inf if faster_than is None else faster_than,
    )
    for choices in mesh_groups(problem, num_layers, accepts=sizes.accepts):
        accepted = [c for c in choices if sizes.accepts(c.micro_batch_size)]
        found = search.best_of(accepted)
        if found is not None:
            return found
        if clock.left <= 0 or search.num_fitting:
            break
    raise InfeasibleError(search.why_none())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A choice under a schedule, and what is known of it so far."""

    choice: Choice
    schedule: Schedule
    group_size: int
    model: OrderModel | None = None
    split: Split | None = None
    """A simple one, once there is a model."""
    is_improved: bool = False
    """Then it fits, by the model."""


@dataclass(slots=True, kw_only=True)
class _Queue:
    """A schedule's candidates, a heap."""

    waiting: list[tuple[float, int, _Candidate]] = field(default_factory=list)
    """With their seconds as far as they are known, and numbers that tell equal ones apart."""
    num_simulated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A placement that fits."""

    model: OrderModel
    split: Split
    placement: Placement
    step_seconds: float


@dataclass(slots=True, kw_only=True)
class _Search:
    problem: Problem
    simulate: Callable[[Placement], Simulated]
    schedules: tuple[Schedule, ...]
    clock: Clock
    least: float
    """Seconds of the fastest plan known."""
    builder: Builder = field(init=False)
    num_fitting: int = 0
    """Candidates with a split that fits by the model."""
    peak_ratios: dict[_Kind, tuple[float, ...]] = field(default_factory=dict)
    """What the last simulation of this kind said of the model's memory."""
    nearest: tuple[int, int, str] | None = None
    """Bytes beyond the limit, pipeline rank and description of the nearest miss."""

    def __post_init__(self) -> None:
        self.builder = Builder(problem=self.problem)

    def best_of(self, choices: Sequence[Choice]) -> tuple[Placement, float] | None:
        """The best of the choices under this schedule; None if none fits."""
        found = sorted(self._found(choices), key=lambda one: one.step_seconds)
        worth = [one for one in found if one.step_seconds <= _MAY_LEAD * found[0].step_seconds]
        improved = map(self._improved, worth[:_MAX_IMPROVED])
        best = min(improved, key=lambda one: one.step_seconds, default=None)
        return None if best is None else (best.placement, best.step_seconds)

    def why_none(self) -> str:
        """Of a search that has found nothing."""
        if self.nearest is None:
            names = " or ".join(schedule.value for schedule in self.schedules)
            return f"no mesh and batch go with the {names} schedule"
        excess, rank, words = self.nearest
        return f"out of memory by {format_bytes(excess)} on rank {rank} ({words})"

    def _found(self, choices: Sequence[Choice]) -> Iterator[_Found]:
        """Of the candidates that may be fastest, those that fit. The schedule that has had the
        least time has the next turn."""
        queues = self._queues(choices)
        spent = dict.fromkeys(queues, 0.0)
        share = (1 - _MOVES_SHARE) * self.clock.limit_seconds
        while queues and self.clock.left > -self.clock.limit_seconds:
            schedule = min(queues, key=spent.__getitem__)
            queue, began = queues[schedule], self.clock.spent
            if self.clock.spent >= share and self.least < math.inf:
                return
            for found in self._turn(queue):
                self.least = min(self.least, found.step_seconds)
                yield found
            spent[schedule] += self.clock.spent - began
            if not queue.waiting:
                del queues[schedule]

    def _turn(self, queue: _Queue) -> Iterator[_Found]:
        """Ask more about the candidate that looks fastest. A first estimate knows no memory and no
        order, that of a simple split no better ones; after each it waits for its turn again."""
        seconds, number, candidate = heapq.heappop(queue.waiting)
        if seconds > self.least * _NEAR or queue.num_simulated >= _MAX_SIMULATED:
            queue.waiting.clear()
        elif candidate.model is None:
            model = self._model_of(candidate)
            split = model.simple_split()
            candidate = replace(candidate, model=model, split=split)
            heapq.heappush(queue.waiting, (model.seconds(split), number, candidate))
        elif not candidate.is_improved:
            assert candidate.split is not None
            model, split = candidate.model, candidate.model.improved(candidate.split)
            excess = model.excess_bytes(split)
            if max(excess) > 0:
                self._note_miss(excess, candidate.choice)
                return
            self.num_fitting += 1
            candidate = replace(candidate, split=split, is_improved=True)
            heapq.heappush(queue.waiting, (model.seconds(split), number, candidate))
        elif seconds <= self.least * _NEARER:
            queue.num_simulated += 1
            yield from self._simulated(candidate)

    def _queues(self, choices: Sequence[Choice]) -> dict[Schedule, _Queue]:
        """By schedule, its candidates by their first estimates."""
        found: dict[Schedule, _Queue] = {}
        for number, (seconds, candidate) in enumerate(self._candidates(choices)):
            queue = found.setdefault(candidate.schedule, _Queue())
            queue.waiting.append((seconds, number, candidate))
        for queue in found.values():
            heapq.heapify(queue.waiting)
        return found

    def _candidates(self, choices: Sequence[Choice]) -> Iterator[tuple[float, _Candidate]]:
        """With the first estimate of their seconds."""
        plain = {
            replace(
                choice, recompute=self.problem.constraints.recompute, offload_state=False,
                offload_inputs=False,
                num_buffers=self.problem.constraints.num_buffers or _NUM_BUFFERS,
            )
            for choice in choices
        }  # fmt: skip
        for choice in sorted(plain, key=str):
            for schedule in self.schedules:
                groups = _group_sizes(schedule, choice)
                seconds = quick_seconds(self.builder, choice, schedule) if groups else math.inf
                for group_size in groups:
                    candidate = _Candidate(choice=choice, schedule=schedule, group_size=group_size)
                    yield seconds, candidate

    def _model_of(self, candidate: _Candidate) -> OrderModel:
        return model_of(
            self.builder, candidate.choice, candidate.schedule, candidate.group_size,
            self.peak_ratios.get(_kind_of(candidate), ()),
        )  # fmt: skip

    def _simulated(self, candidate: _Candidate) -> Iterator[_Found]:
        """Those that fit, of splits by the model with ever better knowledge of memory."""
        model, split, choice = candidate.model, candidate.split, candidate.choice
        assert model is not None
        assert split is not None
        limits = self.builder.mesh_of(choice).limit_bytes
        tried = set()
        for _ in range(_MAX_CORRECTIONS):
            tried.add(split)
            placement, simulated = self._leanest(model, split)
            if simulated.fits(limits):
                yield _Found(
                    model=model,
                    split=split,
                    placement=placement,
                    step_seconds=simulated.step_seconds,
                )
                if not any(split.recompute):
                    return
            else:
                peaks = zip(simulated.peak_bytes, limits, strict=True)
                self._note_miss([peak - limit for peak, limit in peaks], choice)
            model = model.corrected(split, simulated.peak_bytes)
            self.peak_ratios[_kind_of(candidate)] = model.peak_ratios
            split = model.improved(model.simple_split(split))
            if split in tried or max(model.excess_bytes(split)) > 0 or self.clock.left <= 0:
                return

    def _improved(self, found: _Found) -> _Found:
        """With single moves that the simulator finds faster; the model says which are tried."""
        limits = self.builder.mesh_of(found.model.choice).limit_bytes
        tried, num_left = {found.split}, _MAX_MOVES
        moves = iter(found.model.near(found.split, _MAY_LEAD))
        while num_left and self.clock.left > 0:
            split = next((split for split in moves if split not in tried), None)
            if split is None:
                break
            tried.add(split)
            num_left -= 1
            cuts, flags = split.boundaries, split.recompute
            placement = replace(found.placement, boundaries=cuts, recompute=flags)
            simulated = self.simulate(placement)
            if simulated.fits(limits) and simulated.step_seconds < found.step_seconds:
                seconds = simulated.step_seconds
                found = replace(found, split=split, placement=placement, step_seconds=seconds)
                moves = iter(found.model.near(split, _MAY_LEAD))
        return found

    def _leanest(self, model: OrderModel, split: Split) -> tuple[Placement, Simulated]:
        """The first number of buffers that fits, or the last."""
        limits = self.builder.mesh_of(model.choice).limit_bytes
        for placement in self._placements(model, split):
            simulated = self.simulate(placement)
            if simulated.fits(limits):
                break
        return placement, simulated

    def _placements(self, model: OrderModel, split: Split) -> Iterator[Placement]:
        """With buffers for all of a rank's stages, as alternating orders come back to each of them;
        and with fewer, where the weights are gathered for each stay. As many as are demanded."""
        placement = model.placement(split)
        sizes = [placement.num_weight_buffers]
        if self.problem.constraints.num_buffers is None:
            sizes.insert(0, model.choice.stages_per_rank)
        for size in dict.fromkeys(sizes):
            yield replace(placement, num_weight_buffers=size, num_gradient_buffers=size)

    def _note_miss(self, excess_bytes: Sequence[int], choice: Choice) -> None:
        excess = max(excess_bytes)
        if self.nearest is None or excess < self.nearest[0]:
            self.nearest = excess, excess_bytes.index(excess), choice.describe()


def _kind_of(candidate: _Candidate) -> _Kind:
    choice = candidate.choice
    mesh = choice.num_replicas, choice.num_pipeline_ranks
    return candidate.schedule, *mesh, choice.micro_batch_size


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
