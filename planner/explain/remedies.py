"""The smallest single changes that make an infeasible problem feasible, each solved again.

A change counts only if a plan is found under it whose simulated peak fits. Changes of what
was demanded (recomputation, partition, micro-batches, ...) cost nothing but time and come first;
then those of memory, devices and batch, the relatively smallest first. This module knows what can
be changed. It does not know why nothing fits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from planner.any_schedule import solve_any
from planner.errors import InfeasibleError, LgaError
from planner.explain.changes import ClusterAt, WhatIf, changed
from planner.explain.fit import first_fit
from planner.explain.types import PlannerFor, simulator
from planner.solve import Constraints, Placement, Problem
from planner.solve.choices import divisors
from planner.solve.entry import Clock
from planner.solve.infeasible import format_bytes, least_memory

__all__ = ["Remedy", "find_remedies", "with_remedies"]

_LEAST_KIND_SECONDS = 2.0
_LEAST_SOLVE_SECONDS, _MAX_SOLVE_SECONDS = 2.0, 4.0
_MAX_BATCHES = 5
_PRECISION = 0.05
"""Relative, of the smallest memory."""
_MORE_MEMORY = (1.0, 1.05, 1.15, 1.4, 2.0, 4.0)
"""Times what the memory model asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A single change under which a plan was found, simulated, and seen to fit."""

    words: str
    size: float
    """Relative change of memory, devices or batch; 0 where only a choice changes."""
    problem: Problem
    placement: Placement
    step_seconds: float


def with_remedies(
    error: InfeasibleError,
    problem: Problem,
    planner_for: PlannerFor,
    *,
    cluster_at: ClusterAt | None = None,
    time_limit_seconds: float = 20.0,
) -> InfeasibleError:
    """The error, with the changes that would help as its hint."""
    found = find_remedies(
        problem, planner_for, cluster_at=cluster_at, time_limit_seconds=time_limit_seconds
    )
    words = [f"{remedy.words} ({_seconds(remedy.step_seconds)} a step)" for remedy in found]
    none = "a smaller model: no single change of memory, batch, devices or demands was found to fit"
    return InfeasibleError(error.message, hint="; or ".join(words) or none)


def find_remedies(
    problem: Problem,
    planner_for: PlannerFor,
    *,
    cluster_at: ClusterAt | None = None,
    time_limit_seconds: float = 20.0,
) -> tuple[Remedy, ...]:
    """Single changes that make an infeasible problem feasible, the smallest first.

    Each kind of change is tried from its smallest on, and gets its part of the time limit.
    """
    search = _Search(
        problem=problem,
        planner_for=planner_for,
        cluster_at=cluster_at,
        clock=Clock(limit_seconds=time_limit_seconds),
    )
    kinds = (search.memory, search.choices, search.devices, search.batch)
    found: list[Remedy] = []
    for number, kind in enumerate(kinds):
        search.begin(search.clock.left / (len(kinds) - number))
        found += kind()
    return tuple(sorted(found, key=lambda remedy: (remedy.size, remedy.step_seconds)))


@dataclass(slots=True, kw_only=True)
class _Search:
    problem: Problem
    planner_for: PlannerFor
    cluster_at: ClusterAt | None
    clock: Clock
    deadline: float = field(default=0.0)
    """Of the kind of change at hand."""

    def begin(self, seconds: float) -> None:
        """Another kind of change, for so long, but long enough for one try of it."""
        least = min(self.clock.limit_seconds, _LEAST_KIND_SECONDS)
        self.deadline = self.clock.spent + max(least, seconds)

    def choices(self) -> Iterator[Remedy]:
        """Each demand withdrawn, or offload asked for."""
        tried = list(self._freed())
        for number, (constraints, describe) in enumerate(tried):
            problem = replace(self.problem, constraints=constraints)
            yield from self._remedy(problem, describe, 0.0, among=len(tried) - number)

    def _freed(self) -> Iterator[tuple[Constraints, Callable[[Placement], str]]]:
        wanted = self.problem.constraints
        for names, describe in _DEMANDS:
            if any(getattr(wanted, name) is not None for name in names):
                yield replace(wanted, **dict.fromkeys(names)), describe
        if wanted.offload_state is None:
            yield replace(wanted, offload_state=True), _offload
        if wanted.offload_inputs is None:
            yield replace(wanted, offload_inputs=True), _offload

    def memory(self) -> Iterator[Remedy]:
        """The smallest limit under which a plan was found."""
        seconds = self._left
        try:
            asked = least_memory(self.problem)
        except LgaError:
            return
        self.begin(seconds)
        known: Remedy | None = None
        for number, factor in enumerate(_MORE_MEMORY):
            known = self._with_memory(math.ceil(asked * factor), len(_MORE_MEMORY) - number)
            if known is not None or self._left <= 0:
                break
        if known is None:
            return
        low = self._own_limit
        while self._left > 0:
            high = known.problem.memory_limit_bytes or 0
            if high - low <= _PRECISION * high:
                break
            middle = (low + high) // 2
            better = self._with_memory(middle, 2)
            if better is None:
                low = middle
            else:
                known = better
        words, size = known.words, known.size
        solved = self._remedy(known.problem, lambda _: words, size, among=1)
        yield next(iter(solved), known)

    def devices(self) -> Iterator[Remedy]:
        """The fewest more that were found to be enough."""
        number = self.problem.num_devices
        host = max(host.num_devices for host in self.problem.cluster.hosts)
        counts = {number + 1, number + max(1, number // 2), number + host, 2 * number, 4 * number}
        for index, count in enumerate(sorted(counts)):
            try:
                problem = changed(self.problem, WhatIf(num_devices=count), self.cluster_at)
            except LgaError:
                continue
            among = len(counts) - index
            found = list(self._remedy(problem, _devices, count / number - 1, among=among))
            if found:
                yield from found
                return

    def batch(self) -> Iterator[Remedy]:
        """The largest smaller batch that was found to fit, of a few."""
        batch = self.problem.global_batch_size
        smaller = [count for count in divisors(batch)[::-1] if count < batch][:_MAX_BATCHES]
        for index, count in enumerate(smaller):
            problem = replace(self.problem, global_batch_size=count)
            among = len(smaller) - index
            found = list(self._remedy(problem, _batch, batch / count - 1, among=among))
            if found:
                yield from found
                return

    @property
    def _left(self) -> float:
        return self.deadline - self.clock.spent

    @property
    def _own_limit(self) -> int:
        limit, cluster = self.problem.memory_limit_bytes, self.problem.cluster
        devices = (host.device for host in cluster.hosts)
        return limit or min(device.usable_bytes for device in devices)

    def _with_memory(self, num_bytes: int, among: int) -> Remedy | None:
        """With so much per device, rounded up to what words can say."""
        enough = _round_up(num_bytes)
        problem = replace(self.problem, memory_limit_bytes=enough)
        words = f"a memory limit of {format_bytes(enough)} per device"
        size = enough / self._own_limit - 1
        found = self._remedy(problem, lambda _: words, size, among=among, solves=False)
        return next(iter(found), None)

    def _remedy(
        self,
        problem: Problem,
        describe: Callable[[Placement], str],
        size: float,
        *,
        among: int,
        solves: bool = True,
    ) -> Iterator[Remedy]:
        """The changed problem's solution, if it has one; the time left is for so many problems.

        Without `solves` it is any plan that fits.
        """
        if self._left <= 0:
            return
        simulate = simulator(self.planner_for(problem))
        seconds = min(_MAX_SOLVE_SECONDS, max(_LEAST_SOLVE_SECONDS, self._left / among))
        placement = first_fit(problem, simulate, time_limit_seconds=seconds)
        if placement is None:
            return
        if solves:
            limited = replace(problem, time_limit_seconds=seconds)
            with suppress(LgaError):
                placement = solve_any(limited, simulate).placement
        yield Remedy(
            words=describe(placement),
            size=size,
            problem=problem,
            placement=placement,
            step_seconds=simulate(placement).step_seconds,
        )


def _recompute(placement: Placement) -> str:
    if all(placement.recompute):
        return "recompute the activations"
    return f"recompute the activations of {sum(placement.recompute)} stages"


def _partition(placement: Placement) -> str:
    return f"partition level {placement.partition}"


def _micro_batches(placement: Placement) -> str:
    return (
        f"{placement.num_micro_batches} micro-batches of {placement.micro_batch_size} per replica"
    )


def _stages(placement: Placement) -> str:
    loops = placement.num_stages // placement.num_pipeline_ranks
    return f"{_counted(loops, 'stage')} per rank"


def _mesh(placement: Placement) -> str:
    replicas = _counted(placement.num_replicas, "replica")
    return f"{replicas} x {_counted(placement.num_pipeline_ranks, 'pipeline rank')}"


def _offload(placement: Placement) -> str:
    names = ["state"] * placement.offload_state + ["stored inputs"] * placement.offload_inputs
    return f"offload {' and '.join(names)} to host memory"


def _schedule(placement: Placement) -> str:
    return f"the {placement.schedule.value} schedule"


def _buffers(placement: Placement) -> str:
    return f"pools of {placement.num_weight_buffers} buffers"


def _devices(placement: Placement) -> str:
    return f"{placement.world_size} devices ({_mesh(placement)})"


def _batch(placement: Placement) -> str:
    return f"a global batch of {placement.global_batch_size} samples"


_DEMANDS: tuple[tuple[tuple[str, ...], Callable[[Placement], str]], ...] = (
    (("recompute",), _recompute),
    (("partition",), _partition),
    (("micro_batch_size", "num_micro_batches"), _micro_batches),
    (("stages_per_rank",), _stages),
    (("num_replicas", "num_pipeline_ranks"), _mesh),
    (("offload_state",), _offload),
    (("offload_inputs",), _offload),
    (("num_buffers",), _buffers),
    (("schedule",), _schedule),
)
"""Constraints that are withdrawn together, and what the plan found has instead."""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _round_up(num_bytes: int) -> int:
    """To hundredths of the unit that `format_bytes` prints, so that the printed figure is true."""
    for unit in (2**30, 2**20, 2**10):
        if num_bytes >= 4 * unit:
            return math.ceil(math.ceil(num_bytes * 100 / unit) * unit / 100)
    return num_bytes


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
