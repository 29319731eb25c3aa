"""A step time that no plan undercuts, whatever its order of compute: the bound of every schedule.

Whatever the order, the mean rank does its share of all compute. Before its first forward the first
micro-batch comes down the layers before its own; after its last backward that micro-batch still
goes back through them, and then the first layer's gradients are reduced and its weights updated.
What holds only where all micro-batches go forward before any goes back (the turn at the end of the
pipeline, the memory that all of them keep) is left to `planner.solve.floor`.
This module knows layers and links. It knows no splits, no memory and no schedules.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.solve.branch import Branches
from planner.solve.build import Builder
from planner.solve.entry import Clock
from planner.solve.floor import traffic_seconds
from planner.solve.floor_memory import Surroundings
from planner.solve.problem import Problem
from planner.solve.rates import LayerFloors, Rates
from planner.solve.sizes import Sizes, in_order
from planner.solve.space import Batching, all_options, batchings

__all__ = ["any_order_seconds"]

MAX_PROFILED = 6
"""Micro-batch sizes that are profiled for the bound alone; others are bounded from those."""


def any_order_seconds(
    problem: Problem, *, halves_backward: bool, profiled: Iterable[int] = ()
) -> float:
    """Seconds that no plan of the problem takes less than, of any mesh, batching and order.

    The demands of the problem hold, that of a schedule aside; its memory is not asked about. With
    `halves_backward` orders may do the weights' half of a backward later than the inputs' (ZB-H1).
    `profiled` are micro-batch sizes whose profiles cost nothing any more.

    Raises:
        UsageError: no mesh and batching meets the demands.
        TraceError: the model cannot be traced with any micro-batch size.
    """
    return _Search(problem=problem, halves_backward=halves_backward).least(profiled)


def _least_of_batching(
    batching: Batching,
    floors: LayerFloors,
    surroundings: Mapping[tuple[int, int], Surroundings],
    *,
    halves_backward: bool,
) -> float:
    """The same of one mesh and batching, with any of these partition levels and groups."""
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    compute = count * float(floors.prefix[-1]) / ranks
    ahead = np.concatenate([[0.0], np.cumsum(floors.forward)])
    # Either direction of the layers before a rank's own; weights' halves can fill the way back.
    waits = ahead if halves_backward else floors.prefix
    mean = compute + float(waits[:ranks].mean())
    crowded = count * _fullest(floors, ranks)
    # All micro-batches go through each layer, after the layers before it and before the way back.
    through = float((waits[:-1] + count * floors.both).max())
    # The last of them to enter a layer goes on through all the others, as did the first to leave.
    longest = 0.0 if halves_backward else max(floors.forward.max(), floors.backward.max())
    chain = 0.0 if halves_backward else float(floors.prefix[-1] + (count - 1) * longest)
    whole = max(mean, crowded, through, chain)
    least = math.inf
    for (partition, _), around in surroundings.items():
        start, end, reductions = traffic_seconds(batching, around, partition)
        updates = around.trainable_bytes * around.update_seconds
        updates = updates / (around.num_parts if partition else 1)
        last = end
        if around.trainable_bytes[0]:
            last += max(float(updates[0]), around.least_update_seconds)
        seconds = (
            start + whole + (0.0 if halves_backward else last),
            # Updates take compute time too, but may fill the wait at a rank's end.
            start
            + compute
            + float(ahead[:ranks].mean())
            + float(updates.sum()) * around.updates_compute / ranks,
            # No gradient is there before a micro-batch has been through the whole model.
            start + float(ahead[-1]) + reductions,
        )
        least = min(least, max(seconds))
    return least


def _fullest(floors: LayerFloors, ranks: int) -> float:
    """Of so many long layers some rank has its share, rounded up: its seconds per micro-batch."""
    shares = -(-np.arange(1, len(floors.falling) + 1) // ranks)
    return float((shares * floors.falling).max())


@dataclass(slots=True, kw_only=True)
class _Search:
    """Meshes and batchings, the lowest bound first, until the lowest cannot be made higher."""

    problem: Problem
    halves_backward: bool
    sizes: Sizes = field(init=False)
    rates: Rates = field(init=False)
    branches: Branches = field(init=False)
    _floors: dict[int, LayerFloors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = Sizes(problem=self.problem, clock=Clock(limit_seconds=math.inf))
        self.rates = Rates(problem=self.problem)
        self.branches = Branches(
            problem=self.problem,
            num_layers=len(self.sizes.any_graph().layers),
            sizes=self.sizes,
            builder=Builder(problem=self.problem),
            rates=self.rates,
        )

    def least(self, profiled: Iterable[int]) -> float:
        space = batchings(self.problem, self.branches.num_layers)
        self._begin({batching.micro_batch_size for batching in space}, profiled)
        # Compute alone first, which costs next to nothing.
        waiting = [(self._compute(one), number, False) for number, one in enumerate(space)]
        heapq.heapify(waiting)
        left = MAX_PROFILED
        while waiting:
            bound, number, is_bounded = heapq.heappop(waiting)
            size = space[number].micro_batch_size
            if is_bounded:
                if size in self.rates.known or left == 0:
                    return bound
                if not self.sizes.accepts(size):
                    continue
                self._learn(size)
                left -= 1
            better = max(bound, self._bounded(space[number]))
            heapq.heappush(waiting, (better, number, True))
        self.sizes.raise_if_all_refused()
        raise AssertionError

    def _begin(self, wanted: set[int], profiled: Iterable[int]) -> None:
        """At least two sizes, from which those between and beyond follow."""
        for size in (*profiled, *in_order(wanted)):
            if size in wanted and self.sizes.accepts(size):
                self._learn(size)
            if len(self.rates.known) >= min(2, len(wanted)):
                return
        self.sizes.raise_if_all_refused()

    def _learn(self, size: int) -> None:
        self.rates.learn(size)
        self._floors.clear()

    def _floors_at(self, size: int) -> LayerFloors:
        if size not in self._floors:
            self._floors[size] = self.rates.at(size)
        return self._floors[size]

    def _compute(self, batching: Batching) -> float:
        seconds = self._floors_at(batching.micro_batch_size).prefix[-1]
        return float(batching.num_micro_batches * seconds / batching.num_pipeline_ranks)

    def _bounded(self, batching: Batching) -> float:
        options = all_options(self.problem, batching)
        return _least_of_batching(
            batching,
            self._floors_at(batching.micro_batch_size),
            {
                (one.partition, one.partition_group_size): self.branches.surroundings(
                    batching, one.partition_group_size
                )
                for one in options
            },
            halves_backward=self.halves_backward,
        )
