"""The chain of down-closed sets whose largest part is least, by a pruned dynamic programme.

States are (accelerators used, hosts used, set). A set is kept only where what is left of the graph
still fits the devices that are left, and where no larger set is as good: adding to the parts so far
a node that outweighs its transfers makes no later part larger. This module knows a pool of sets and
what a part costs. It does not know where the pool comes from.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from planner.solve.dag import DagProblem
from planner.solve.dag_bound import HostCapacity
from planner.solve.dag_contract import Contracted
from planner.solve.dag_sets import SetPool

__all__ = ["TINY", "Chain", "ChainSearch", "OutOfTime", "heavy_nodes"]

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]
MAX_CELLS = 2_000_000
"""Of a table of parts at a time."""
TINY = 1e-9
"""Relative; sums of seconds in another order differ by less."""


class OutOfTime(Exception):  # noqa: N818
    """The deadline passed before the answer was known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A split of the contracted graph."""

    sets: tuple[int, ...]
    """Ascending, from the empty to the full one: part j is what set j + 1 has over set j."""
    is_host: tuple[bool, ...]
    """Of each part."""
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What is known of the sets that end a number of parts."""

    sets: Indices
    """Indices into the pool."""
    loads: Floats
    """Of each: the least largest load so far."""
    origins: Indices
    """Of each: the position, in the earlier state, of the set that it grew from."""
    by_host: NDArray[numpy.bool_]
    """Of each: whether a host holds the part in between."""


def heavy_nodes(graph: Contracted) -> int:
    """The nodes whose seconds outweigh the transfers that they may be the first nodes of."""
    ancestors = [0] * graph.num_nodes
    for node in range(graph.num_nodes):
        ancestors[node] |= graph.predecessors[node]
        for successor in graph.successors[node]:
            ancestors[successor] |= ancestors[node]
    begun = [0.0] * graph.num_nodes
    for nodes, seconds in graph.transfers:
        held = sum(1 << node for node in nodes)
        for node in nodes:
            if not ancestors[node] & held:
                begun[node] += seconds
    return sum(
        1 << node
        for node, seconds in enumerate(graph.accelerator_seconds)
        if seconds >= begun[node]
    )


class ChainSearch:
    """Finds chains in one pool."""

    def __init__(self, problem: DagProblem, graph: Contracted, pool: SetPool) -> None:
        self._num_accelerators, self._num_hosts = problem.num_accelerators, problem.num_hosts
        self._memory_limit = problem.memory_limit_bytes * (1 + TINY)
        self._pool = pool
        self._none = numpy.array([pool.masks.index(0)])
        self._full = pool.masks.index((1 << graph.num_nodes) - 1)
        holds = pool.holds
        self._host_seconds: Floats = holds @ graph.host_seconds
        self._num_bytes: Floats = holds @ graph.num_bytes
        ones = numpy.ones(graph.num_nodes)
        self._need_host: Floats = holds @ (ones * graph.needs_host)
        self._need_accelerator: Floats = holds @ (ones * graph.needs_accelerator)
        self._transfer_seconds = numpy.array([seconds for _, seconds in graph.transfers])
        self._touches = numpy.zeros((graph.num_nodes, len(graph.transfers)), numpy.float32)
        for index, (nodes, _) in enumerate(graph.transfers):
            self._touches[list(nodes), index] = 1
        self._sizes = self._touches.sum(axis=0)
        self._host_capacity = HostCapacity(graph)

    def best(self, limit: float, floor: float, deadline: float) -> Chain | None:
        """The chain with the least largest load, if that is at most `limit`.

        A load below `floor` counts as no better than `floor`: with both equal, any chain within
        the limit will do. Where the pool is complete, None means that there is none.

        Raises:
            OutOfTime: the deadline (`time.monotonic`) passed.
        """
        states: dict[tuple[int, int], _State] = {}
        for key in self._keys():
            if time.monotonic() > deadline:
                raise OutOfTime
            states[key] = self._state(key, states, limit, floor)
        last = states[self._num_accelerators, self._num_hosts]
        found = numpy.flatnonzero(last.sets == self._full)
        return self._chain(states, int(found[0])) if len(found) else None

    def _keys(self) -> Iterator[tuple[int, int]]:
        for accelerators in range(self._num_accelerators + 1):
            for hosts in range(self._num_hosts + 1):
                yield accelerators, hosts

    def _state(
        self,
        key: tuple[int, int],
        states: dict[tuple[int, int], _State],
        limit: float,
        floor: float,
    ) -> _State:
        accelerators, hosts = key
        if key == (0, 0):
            return _State(
                sets=self._none,
                loads=numpy.zeros(1),
                origins=numpy.zeros(1, numpy.int64),
                by_host=numpy.zeros(1, bool),
            )
        first, end = self._window(accelerators, hosts, limit)
        window = numpy.arange(first, end)
        loads = numpy.full(len(window), math.inf)
        origins = numpy.zeros(len(window), numpy.int64)
        by_host = numpy.zeros(len(window), bool)
        step = max(1, MAX_CELLS // max(1, len(window)))
        for is_host, earlier in enumerate(((accelerators - 1, hosts), (accelerators, hosts - 1))):
            state = states.get(earlier)
            if state is None or not len(state.sets) or not len(window):
                continue
            for start in range(0, len(state.sets), step):
                rows = slice(start, start + step)
                costs = self._costs(state.sets[rows], window, is_host=bool(is_host))
                numpy.maximum(costs, state.loads[rows, None], out=costs)
                row = costs.argmin(axis=0)
                least = costs[row, numpy.arange(len(window))]
                better = least < loads
                loads[better], origins[better] = least[better], row[better] + start
                by_host[better] = is_host
        kept = self._undominated(first, end, loads, limit, floor)
        return _State(
            sets=window[kept], loads=loads[kept], origins=origins[kept], by_host=by_host[kept]
        )

    def _window(self, accelerators: int, hosts: int, limit: float) -> tuple[int, int]:
        """The sets that this many devices can hold, and the rest of the devices the rest."""
        seconds, capacity = self._pool.seconds, self._host_capacity(limit)
        total = float(seconds[-1])
        left = (self._num_accelerators - accelerators) * limit
        left += (self._num_hosts - hosts) * capacity
        most = accelerators * limit + hosts * capacity
        slack = total * TINY
        return (
            int(numpy.searchsorted(seconds, total - left - slack, side="left")),
            int(numpy.searchsorted(seconds, most + slack, side="right")),
        )

    def _undominated(
        self, first: int, end: int, loads: Floats, limit: float, floor: float
    ) -> NDArray[numpy.bool_]:
        """Which sets to go on from."""
        kept = loads <= limit * (1 + TINY)
        pool = self._pool
        pairs = slice(*numpy.searchsorted(pool.smaller, (first, end)))
        smaller, larger = pool.smaller[pairs], pool.larger[pairs]
        inside = (larger >= first) & (larger < end)
        smaller, larger = smaller[inside] - first, larger[inside] - first
        worse = loads[larger] <= numpy.maximum(loads[smaller], floor)
        kept[smaller[worse & kept[larger]]] = False
        return kept

    def _costs(self, rows: Indices, columns: Indices, *, is_host: bool) -> Floats:
        """[row, column]: load of what the column's set has over the row's, infinite where it is no
        part: the column's set does not hold the row's, or the device cannot."""
        pool = self._pool
        ends, begins = pool.holds[columns], pool.holds[rows]
        lacking = numpy.flatnonzero(begins.any(axis=0) & ~ends.all(axis=0))
        outside = begins[:, lacking].astype(numpy.float32) @ (1 - ends[:, lacking]).T.astype(
            numpy.float32
        )
        forbidden = outside > 0

        def gained(prefix: Floats) -> Floats:
            return prefix[columns][None, :] - prefix[rows][:, None]

        if is_host:
            costs = gained(self._host_seconds)
            forbidden |= gained(self._need_accelerator) > 0
        else:
            costs = gained(pool.seconds) + self._moved(begins, ends)
            forbidden |= gained(self._need_host) > 0
            if math.isfinite(self._memory_limit):
                forbidden |= gained(self._num_bytes) > self._memory_limit
        costs[forbidden] = math.inf
        return costs

    def _moved(self, begins: NDArray[numpy.uint8], ends: NDArray[numpy.uint8]) -> Floats:
        """[begin, end]: seconds of the transfers that a part has some nodes of, but not all.

        A part has none where begin and end hold as many of the transfer's nodes, as end holds all
        that begin does; it has all where begin holds none and end all.
        """
        begin_counts = begins.astype(numpy.float32) @ self._touches
        end_counts = ends.astype(numpy.float32) @ self._touches
        none, full = (begin_counts == 0).all(axis=0), (end_counts == self._sizes).all(axis=0)
        low, high = begin_counts.min(axis=0), end_counts.max(axis=0)
        active = numpy.flatnonzero(~(none & full) & (low < high))
        # Ascending sizes, so that the transfers that can have a count are the last ones.
        active = active[numpy.argsort(self._sizes[active], kind="stable")]
        sizes, seconds = self._sizes[active], self._transfer_seconds[active]
        begin_counts, end_counts = begin_counts[:, active], end_counts[:, active]
        moved = numpy.full((len(begins), len(ends)), seconds.sum())

        def free(begin: NDArray[numpy.bool_], end: NDArray[numpy.bool_], first: int) -> None:
            both = numpy.flatnonzero(begin.any(axis=0) & end.any(axis=0))
            if len(both):
                weighted = begin[:, both] * seconds[first:][both]
                numpy.subtract(moved, weighted @ end[:, both].T, out=moved)

        free(begin_counts == 0, end_counts == sizes, 0)
        for count in range(int(sizes[-1]) + 1 if len(sizes) else 0):
            first = int(numpy.searchsorted(sizes, count))
            free(begin_counts[:, first:] == count, end_counts[:, first:] == count, first)
        return moved

    def _chain(self, states: dict[tuple[int, int], _State], position: int) -> Chain:
        key = (self._num_accelerators, self._num_hosts)
        load = float(states[key].loads[position])
        sets = [self._pool.masks[states[key].sets[position]]]
        is_host: list[bool] = []
        while key != (0, 0):
            state = states[key]
            by_host = bool(state.by_host[position])
            position = int(state.origins[position])
            key = (key[0], key[1] - 1) if by_host else (key[0] - 1, key[1])
            earlier = self._pool.masks[states[key].sets[position]]
            if earlier != sets[-1]:
                sets.append(earlier)
                is_host.append(by_host)
        return Chain(sets=tuple(sets[::-1]), is_host=tuple(is_host[::-1]), load_seconds=load)
