"""Buffers that units share: who holds which, from which compute step to which.

A pool serves all own units of one dtype (and compute dtype), or one tied unit. A unit that needs a
buffer and holds none takes one that was never used while the pool may grow, else the one whose
holder was used least recently. This module knows the rule. What a buffer holds and what must happen
when it changes hands is for `weights` and `gradients`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planner.plan.types import Unit

__all__ = ["Holding", "Pools", "pool_name"]


def pool_name(unit: Unit) -> str:
    """The pool of buffers a unit shares: a tied unit's own, else that of all of its dtypes."""
    if len(unit.stages) > 1:
        return unit.name
    return f"{unit.dtype}.{unit.compute_dtype}" if unit.compute_dtype else unit.dtype


@dataclass(slots=True, kw_only=True)
class Holding:
    """A unit in a buffer."""

    unit: Unit
    buffer: str
    free_from: int
    """Compute step behind which the buffer was free for it; -1: from the start."""
    first: int
    """Compute step of its first use; likewise the last."""
    last: int


class Pools:
    """All pools of one kind on one rank."""

    def __init__(
        self, kind: str, size: int, is_busy: Callable[[Holding, int], bool] | None = None
    ) -> None:
        """Pools of `size` buffers `<kind>:<pool>.<i>`.

        `is_busy` says whether a holding must not be disturbed at a step; where all are busy, the
        pool grows.
        """
        self.holdings: list[Holding] = []
        """In the order of their first uses."""
        self._kind, self._size, self._is_busy = kind, size, is_busy
        self._now: dict[str, Holding] = {}
        self._buffers: dict[str, list[Holding]] = {}

    def use(self, unit: Unit, step: int) -> Holding:
        """The unit's holding at a step, which it extends. Steps must not decrease."""
        held = self._now.get(unit.name)
        if held is None:
            held = self._now[unit.name] = self._take(unit, step)
            self.holdings.append(held)
        held.last = step
        return held

    def _take(self, unit: Unit, step: int) -> Holding:
        pool = pool_name(unit)
        holders = self._buffers.setdefault(pool, [])
        free = [h for h in holders if not (self._is_busy and self._is_busy(h, step))]
        if len(holders) < self._size or not free:
            buffer, free_from = f"{self._kind}:{pool}.{len(holders)}", -1
            holders.append(found := _holding(unit, buffer, free_from, step))
            return found
        former = min(free, key=lambda holding: holding.last)
        del self._now[former.unit.name]
        found = _holding(unit, former.buffer, former.last, step)
        holders[next(i for i, h in enumerate(holders) if h is former)] = found
        return found

    def largest(self) -> dict[str, Unit]:
        """The largest unit that each buffer takes, or its pool, where that never grows.

        The buffers of such a pool are alike, so that memory does not depend on which unit meets
        which buffer; a pool that may grow has a buffer for almost every unit, each as it needs.
        """
        units: dict[str, Unit] = {}
        groups = {h.buffer: h.buffer if self._is_busy else pool_name(h.unit) for h in self.holdings}
        for holding in self.holdings:
            group = groups[holding.buffer]
            if units.setdefault(group, holding.unit).num_elements < holding.unit.num_elements:
                units[group] = holding.unit
        return {buffer: units[group] for buffer, group in groups.items()}


def _holding(unit: Unit, buffer: str, free_from: int, step: int) -> Holding:
    return Holding(unit=unit, buffer=buffer, free_from=free_from, first=step, last=step)
