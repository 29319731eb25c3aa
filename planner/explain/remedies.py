"""The smallest single changes that make an infeasible problem feasible, each solved again.

A change counts only if a plan is found under it whose simulated peak fits, and only if that plan is
none for the problem as it is. Changes of what was demanded (recomputation, partition,
micro-batches, ...) cost nothing but time and come first; then those of memory, devices and batch,
the relatively smallest first. This module knows what can be changed. It does not know why nothing
fits.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from planner.any_schedule import solve_any
from planner.errors import InfeasibleError, LgaError
from planner.explain.changes import NO_LIMIT, ClusterAt, WhatIf, changed
from planner.explain.demands import Describe, batch_words, device_words, meets, withdrawn
from planner.explain.fit import first_fit
from planner.explain.types import PlannerFor, limits_of, simulator
from planner.solve import Placement, Problem
from planner.solve.choices import divisors
from planner.solve.entry import Clock
from planner.solve.groups import with_groups
from planner.solve.infeasible import format_bytes

__all__ = ["Remedy", "find_remedies", "with_remedies"]

_LEAST_SECONDS, _MOST_SECONDS = 1.0, 4.0
"""For one problem that is asked whether anything fits."""
_SHARES = {"memory": 0.4, "choices": 0.2, "devices": 0.1, "batch": 0.1}
"""Of the time limit, for whether anything fits under changes of a kind; what is left of it is for
faster plans under those that were found."""
_MAX_BATCHES = 5
_PRECISION = 0.05
"""Relative, of the smallest memory."""
_MORE_MEMORY = (1.0, 1.03, 1.1, 1.3, 2.0, 4.0)
"""Times what a plan takes without a limit."""


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

    Each kind of change is tried from its smallest on, and gets its part of the time limit. Enough
    memory is named whatever the limit, unless no memory is enough.
    """
    clock = Clock(limit_seconds=time_limit_seconds)
    search = _Search(problem=problem, planner_for=planner_for, cluster_at=cluster_at, clock=clock)
    kinds = {
        "memory": search.memory, "choices": search.choices,
        "devices": search.devices, "batch": search.batch,
    }  # fmt: skip
    fits: list[_Fit] = []
    for name, share in _SHARES.items():
        search.deadline = clock.spent + share * time_limit_seconds
        fits += kinds[name]()
    solved = (search.solved(fit, len(fits) - number) for number, fit in enumerate(fits))
    return tuple(sorted(solved, key=lambda remedy: (remedy.size, remedy.step_seconds)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """A change, and any plan that fits under it."""

    problem: Problem
    placement: Placement
    describe: Describe
    size: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Search:
    problem: Problem
    planner_for: PlannerFor
    cluster_at: ClusterAt | None
    clock: Clock
    deadline: float = field(default=0.0)
    """Of the kind of change at hand."""

    def choices(self) -> Iterator[_Fit]:
        """Each demand withdrawn."""
        tried = list(withdrawn(self.problem.constraints))
        for number, (constraints, describe) in enumerate(tried):
            problem = replace(self.problem, constraints=constraints)
            yield from self._fits(problem, describe, among=len(tried) - number)

    def memory(self) -> Iterator[_Fit]:
        """The smallest limit under which a plan was found. Where that plan needs no more than there
        is, the search was too short."""
        found = self._enough()
        if found is None:
            return
        enough, placement = found
        low = self._own_limit
        while (left := self.deadline - self.clock.spent) > 0 and not _is_near(low, enough):
            middle = (low + enough) // 2
            better = self._with_memory(middle, max(_LEAST_SECONDS, left / 3))
            if better is None:
                low = middle
            else:
                enough, placement = middle, better
        if self._answers(placement):
            late = "a longer --time-limit, as a plan fits already"
            yield _Fit(problem=self.problem, placement=placement, describe=lambda _: late)
            return
        enough = _round_up(enough)
        words = self._memory_words(enough) + ("" if _is_near(low, enough) else ", perhaps less")
        yield _Fit(
            problem=replace(self.problem, memory_limit_bytes=enough),
            placement=placement,
            describe=lambda _: words,
            size=enough / self._own_limit - 1,
        )

    def _enough(self) -> tuple[int, Placement] | None:
        """A limit under which a plan is found, near what one takes without any limit: by the memory
        model a plan may need a little more than by the simulator."""
        placement = self._with_memory(NO_LIMIT, _MOST_SECONDS)
        if placement is None:
            return None
        problem = replace(self.problem, memory_limit_bytes=NO_LIMIT)
        peak = max(simulator(self.planner_for(problem))(placement).peak_bytes)
        for factor in _MORE_MEMORY:
            enough = _round_up(math.ceil(factor * peak))
            found = self._with_memory(enough, _LEAST_SECONDS)
            if found is not None:
                return enough, found
        return None

    def devices(self) -> Iterator[_Fit]:
        """The fewest more that were found to be enough."""
        number = self.problem.num_devices
        host = max(host.num_devices for host in self.problem.cluster.hosts)
        counts = {number + 1, number + max(1, number // 2), number + host, 2 * number, 4 * number}
        for index, count in enumerate(sorted(counts)):
            try:
                problem = changed(self.problem, WhatIf(num_devices=count), self.cluster_at)
            except LgaError:
                continue
            among, size = len(counts) - index, count / number - 1
            found = list(self._fits(problem, device_words, size, among=among))
            if found:
                yield from found
                return

    def batch(self) -> Iterator[_Fit]:
        """The largest smaller batch that was found to fit, of a few and of the smallest."""
        batch = self.problem.global_batch_size
        smaller = [count for count in divisors(batch)[::-1] if count < batch]
        smaller = smaller[:_MAX_BATCHES] + smaller[_MAX_BATCHES:][-1:]
        for index, count in enumerate(smaller):
            problem = replace(self.problem, global_batch_size=count)
            among, size = len(smaller) - index, batch / count - 1
            found = list(self._fits(problem, batch_words, size, among=among))
            if found:
                yield from found
                return

    def solved(self, fit: _Fit, among: int) -> Remedy:
        """The changed problem's best plan, where it is found in a share of the time that is left;
        else the one known."""
        simulate = simulator(self.planner_for(fit.problem))
        placement, seconds = fit.placement, self.clock.left / among
        if seconds > 0:
            limited = replace(fit.problem, time_limit_seconds=min(_MOST_SECONDS, seconds))
            with suppress(LgaError):
                better = solve_any(limited, simulate).placement
                if not self._answers(better) and (
                    simulate(better).step_seconds < simulate(placement).step_seconds
                ):
                    placement = better
        return Remedy(
            words=fit.describe(placement),
            size=fit.size,
            problem=fit.problem,
            placement=placement,
            step_seconds=simulate(placement).step_seconds,
        )

    @property
    def _own_limit(self) -> int:
        limit, cluster = self.problem.memory_limit_bytes, self.problem.cluster
        return limit or min(host.device.usable_bytes for host in cluster.hosts)

    def _memory_words(self, enough: int) -> str:
        """As `--memory-limit` where the devices have it."""
        devices = [host.device for host in self.problem.cluster.hosts]
        if all(enough <= device.usable_bytes for device in devices):
            return f"a memory limit of {format_bytes(enough)} per device"
        return f"devices with {format_bytes(enough)} of usable memory each"

    def _with_memory(self, num_bytes: int, seconds: float) -> Placement | None:
        """A plan that fits in so much per device."""
        problem = replace(self.problem, memory_limit_bytes=num_bytes)
        simulate = simulator(self.planner_for(problem))
        return first_fit(problem, simulate, time_limit_seconds=min(_MOST_SECONDS, seconds))

    def _fits(
        self, problem: Problem, describe: Describe, size: float = 0.0, *, among: int
    ) -> Iterator[_Fit]:
        """Whether anything fits under a change; the kind's time left is for so many of them."""
        left = self.deadline - self.clock.spent
        if left <= 0:
            return
        simulate = simulator(self.planner_for(problem))
        seconds = min(_MOST_SECONDS, max(_LEAST_SECONDS, left / among))
        placement = first_fit(problem, simulate, time_limit_seconds=seconds)
        if placement is not None and not self._answers(placement):
            yield _Fit(problem=problem, placement=placement, describe=describe, size=size)

    def _answers(self, placement: Placement) -> bool:
        """Whether it is a plan for the problem as it is, so that the change alters nothing."""
        own = self.problem
        return (
            placement.world_size <= own.num_devices
            and placement.global_batch_size == own.global_batch_size
            and meets(own.constraints, placement)
            and with_groups(own, placement) == placement
            and simulator(self.planner_for(own))(placement).fits(limits_of(own, placement))
        )


def _is_near(low: int, high: int) -> bool:
    return high - low <= _PRECISION * high


def _round_up(num_bytes: int) -> int:
    """To hundredths of the unit that `format_bytes` prints, so that the printed figure is enough
    when it is typed."""
    for unit in (2**30, 2**20, 2**10):
        if num_bytes >= 4 * unit:
            return math.ceil(num_bytes * 100 / unit) * unit // 100
    return num_bytes


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
