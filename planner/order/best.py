"""The best order of compute for a placement: of all families, of list schedules, and of CP-SAT.

What is found is lowered and simulated whole, and the simulator says which is fastest and fits. This
module knows who is asked, and with how much memory. It does not choose the placement.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.order.build import operations_of, order_of_sequences, sequences_of
from planner.order.families import family_orders
from planner.order.improve import MAX_LISTED, best_start, improved
from planner.order.model import Solved
from planner.order.operations import Operations, Sequences, num_operations
from planner.order.paths import Times, least_makespan
from planner.plan.types import Plan
from planner.schedule import Order
from planner.schedules import Schedule
from planner.simulate import Simulation
from planner.solve.types import Placement

__all__ = ["OrderFound", "OrderTried", "Planned", "find_order"]

Planned = Callable[[Placement, Order | None], tuple[Plan, Simulation]]
"""Lowers a placement, with an order of its own if any, and simulates the plan."""

MAX_CORRECTIONS = 6
"""Times that the model's memory is made smaller by what the simulator finds beyond it."""
HALF, ALL = 0.5, 0.8
"""Of the time that is left, for CP-SAT in some of the memory, and in all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderTried:
    """One order that was simulated."""

    name: str
    """The schedule's, `list` or `solved`."""
    plan: Plan
    """Its prediction is still open."""
    simulation: Simulation
    excess_bytes: tuple[int, ...]
    """By pipeline rank: memory that it needs beyond the limit."""

    @property
    def fits(self) -> bool:
        return not any(self.excess_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderFound:
    """The best order, and what is known of it."""

    best: OrderTried
    bound_seconds: float
    """No order of this placement with undivided backwards is faster; inside the layered rule, where
    that was asked for."""
    tried: tuple[OrderTried, ...]
    """Fastest first, those that do not fit last."""

    @property
    def step_seconds(self) -> float:
        """Simulated, of the best."""
        return self.best.simulation.step_seconds

    @property
    def gap(self) -> float | None:
        """(step - bound) / step; None where the best halves backward: the bound is not for it."""
        if self.best.plan.schedule is Schedule.ZERO_BUBBLE:
            return None
        return max(0.0, 1.0 - self.bound_seconds / self.step_seconds)


def find_order(
    planned: Planned,
    placement: Placement,
    limit_bytes: Sequence[int],
    *,
    layered: bool = False,
    families: bool = True,
    time_limit_seconds: float = 10.0,
    seed: int = 0,
) -> OrderFound | None:
    """The fastest order that was found to fit; None where none was.

    Args:
        planned: makes and simulates plans.
        placement: its own schedule is one of the families. With more than MAX_LISTED operations
            it is the only order that is asked for.
        limit_bytes: of memory, per pipeline rank.
        layered: keep to the layered rule: a rank ends the backward of all micro-batches through a
            stage before it begins that of any preceding one.
        families: ask every family for its order too.
        time_limit_seconds: for CP-SAT. With 0 it is not asked.
        seed: of CP-SAT.
    """
    search = _Search(
        planned=planned,
        placement=placement,
        limit_bytes=tuple(limit_bytes),
        layered=layered,
        seed=seed,
        seconds_left=time_limit_seconds,
    )
    if families:
        search.ask_families()
    if num_operations(placement) <= MAX_LISTED:
        search.ask_lists_and_solver()
    return search.found()


@dataclass(slots=True, kw_only=True)
class _Search:
    planned: Planned
    placement: Placement
    limit_bytes: tuple[int, ...]
    layered: bool
    seed: int
    seconds_left: float
    whole: Operations = field(init=False)
    """Its capacity leaves out what orders differ in: none that fits needs more."""
    bound: int = field(init=False)
    known: list[Sequences] = field(default_factory=list)
    """Of the families, and of CP-SAT."""
    is_bounded: bool = False
    """CP-SAT has had its say on the bound."""
    tried: dict[Order, OrderTried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layered = dataclasses.replace(self.placement, schedule=Schedule.LAYERED, group_size=0)
        plan, _ = self.planned(layered, None)
        self.whole = operations_of(plan, layered, self.limit_bytes, layered=self.layered)
        self.bound = least_makespan(self.whole)

    def ask_families(self) -> None:
        """Simulate every family's order."""
        few = num_operations(self.placement) <= MAX_LISTED
        for placement, order in family_orders(self.placement):
            if not few and placement != self.placement:
                break
            if self.layered and placement.schedule is not Schedule.LAYERED:
                continue
            size = f" in groups of {placement.group_size}" if placement.group_size else ""
            self.tried[order] = self._simulated(f"{placement.schedule.value}{size}", placement)
            sequences = sequences_of(self.whole, order)
            if sequences is not None:
                self.known.append(sequences)

    def ask_lists_and_solver(self) -> None:
        """List schedules, then CP-SAT, with less memory until what they find fits; then CP-SAT with
        all the memory that there may be, for the bound."""
        operations = self.whole
        for _ in range(MAX_CORRECTIONS):
            start = best_start(operations, self.known)
            if start is None:
                break
            excess = self._excess("list", start)
            if not any(excess):
                share = ALL if operations == self.whole else HALF
                solved = self._solved(operations, start, share * self.seconds_left)
                excess = self._excess("solved", solved.times)
            if not any(excess):
                break
            operations = _tightened(operations, excess)
        start = None if self.is_bounded else best_start(self.whole, self.known)
        if start is not None and start.makespan > self.bound:
            self._excess("solved", self._solved(self.whole, start, self.seconds_left).times)

    def found(self) -> OrderFound | None:
        """The fastest that fits."""
        ranked = sorted(
            self.tried.values(), key=lambda each: (not each.fits, each.simulation.step_seconds)
        )
        if not ranked or not ranked[0].fits:
            return None
        return OrderFound(
            best=ranked[0],
            bound_seconds=self.bound * self.whole.tick_seconds,
            tried=tuple(ranked),
        )

    def _solved(self, operations: Operations, start: Times, seconds: float) -> Solved:
        began = time.monotonic()
        solved = improved(
            operations,
            start,
            time_limit_seconds=seconds,
            seed=self.seed,
        )
        self.seconds_left = max(0.0, self.seconds_left - (time.monotonic() - began))
        if operations == self.whole:
            self.bound, self.is_bounded = max(self.bound, solved.bound), True
        self.known.append(solved.times.sequences)
        return solved

    def _excess(self, name: str, times: Times) -> tuple[int, ...]:
        """Of an order of ours: bytes beyond each rank's limit."""
        order = order_of_sequences(self.whole, times.sequences, self.placement)
        if order not in self.tried:
            self.tried[order] = self._simulated(name, self.placement, order)
        return self.tried[order].excess_bytes

    def _simulated(self, name: str, placement: Placement, order: Order | None = None) -> OrderTried:
        plan, simulation = self.planned(placement, order)
        pairs = zip(simulation.peak_bytes, self.limit_bytes, strict=True)
        return OrderTried(
            name=name,
            plan=plan,
            simulation=simulation,
            excess_bytes=tuple(max(0, peak - limit) for peak, limit in pairs),
        )


def _tightened(operations: Operations, excess_bytes: Sequence[int]) -> Operations:
    """With so much less memory."""
    return dataclasses.replace(
        operations,
        capacity=tuple(
            max(0, units - -(-excess // operations.unit_bytes))
            for units, excess in zip(operations.capacity, excess_bytes, strict=True)
        ),
    )
