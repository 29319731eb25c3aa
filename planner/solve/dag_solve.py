"""Splits a DAG: the least largest load, with a proof where all down-closed sets can be listed.

First the prefixes of some topological orders give a good split. Then all down-closed sets are
searched, where they are few enough; else those of coarser graphs, and those near the best split,
again and again. The limit on the load is searched by halving, as a tight limit leaves few sets to
look at.

This module knows the order of the attempts. It does not know how a chain is found.
"""

import math
import time
from dataclasses import replace

from planner.errors import InfeasibleError
from planner.solve.dag import DagPart, DagProblem, DagSolution, part_load, require_valid
from planner.solve.dag_bound import least_load, most_load
from planner.solve.dag_chain import TINY, Chain, ChainSearch, OutOfTime, heavy_nodes
from planner.solve.dag_coarse import joined
from planner.solve.dag_contract import Contracted, contract
from planner.solve.dag_sets import (
    Sets,
    all_sets,
    make_pool,
    near_sets,
    nodes_of,
    some_orders,
)

__all__ = ["solve_dag"]

MAX_SETS = 100_000
"""All sets are listed up to this number; a few seconds."""
NUM_RANDOM_ORDERS = 6
COARSE_SETS = 20_000
"""Of a coarser graph, at most."""
COARSER = 0.6
"""Nodes of the next coarser graph, of those of a graph with too many sets."""
MAX_FAILURES = 4
"""Coarser graphs in a row that may find nothing better."""
NEAR_SETS = 12_000
"""Around all sets of the best split together, where not all sets are listed."""
FIRST_STEP = 1e-3
"""By which the limit first exceeds the bound; relative, doubled at every failure."""
CLOSE = 2e-3
"""Relative distance of load and bound at which the least load itself is searched for."""


def solve_dag(
    problem: DagProblem,
    *,
    time_limit_seconds: float = 10.0,
    seed: int = 0,
    max_sets: int = MAX_SETS,
) -> DagSolution:
    """The split with the least largest load, or the best that the time allows.

    `max_sets` is the number of down-closed sets up to which all are searched.

    Raises:
        UsageError: the problem is not well formed.
        InfeasibleError: no split was found that fits the accelerators' memory and puts every node
            where it can run.
    """
    require_valid(problem)
    if not problem.nodes:
        return DagSolution(parts=(), bound_seconds=0.0, num_sets=1, is_complete=True)
    search = _Search(problem, time.monotonic() + time_limit_seconds, seed, max_sets)
    search.run()
    if search.best is None:
        raise InfeasibleError(
            f"no split of {len(problem.nodes)} nodes over {problem.num_accelerators} accelerators "
            f"of {problem.memory_limit_bytes:g} bytes and {problem.num_hosts} hosts was found"
            + ("; there is none" if search.is_complete else ""),
            hint="give more accelerators, memory or hosts",
        )
    load = max(part.load_seconds for part in search.best)
    return DagSolution(
        parts=search.best,
        bound_seconds=min(search.bound, load),
        num_sets=search.num_sets,
        is_complete=search.is_complete,
    )


def _parts(problem: DagProblem, graph: Contracted, chain: Chain) -> tuple[DagPart, ...]:
    parts = []
    for earlier, later, is_host in zip(chain.sets, chain.sets[1:], chain.is_host, strict=False):
        nodes = sorted(n for node in nodes_of(later & ~earlier) for n in graph.members[node])
        load = part_load(problem, nodes, is_host=is_host)
        parts.append(DagPart(is_host=is_host, nodes=tuple(nodes), load_seconds=load))
    return tuple(parts)


class _Search:
    """What is known so far."""

    def __init__(self, problem: DagProblem, deadline: float, seed: int, max_sets: int) -> None:
        self._problem, self._deadline = problem, deadline
        self._seed, self._max_sets = seed, max_sets
        self._graph = contract(problem)
        self.bound = least_load(problem, self._graph)
        """No split has a smaller largest load."""
        self._most = most_load(problem, self._graph)
        self.best: tuple[DagPart, ...] | None = None
        self.num_sets = 0
        self.is_complete = False

    def run(self) -> None:
        """Search until the best split is proved, nothing finds a better one, or time is up."""
        try:
            self._look_in(self._graph, some_orders(self._graph, NUM_RANDOM_ORDERS, self._seed))
            if self._is_solved:
                return
            share = (self._deadline - time.monotonic()) / 3
            sets = all_sets(self._graph, self._max_sets, time.monotonic() + share)
            if sets is not None:
                self.is_complete = True
                self._look_in(self._graph, sets, is_complete=True)
            elif self.best is not None:
                self._look_in_coarser()
                self._look_nearby()
        except OutOfTime:
            pass

    @property
    def _load(self) -> float:
        """The best load, or one that no split exceeds."""
        return self._most if self.best is None else max(part.load_seconds for part in self.best)

    @property
    def _is_solved(self) -> bool:
        return self.best is not None and self._load <= self.bound * (1 + TINY)

    def _look_in_coarser(self) -> None:
        """Search all sets of coarser graphs, until several find nothing better."""
        limit = min(COARSE_SETS, self._max_sets)
        num_groups, num_failures, seed = self._graph.num_nodes, 0, self._seed
        while num_failures < MAX_FAILURES and not self._is_solved:
            sets = None
            while sets is None:
                if time.monotonic() > self._deadline:
                    raise OutOfTime
                num_groups = int(num_groups * COARSER)
                if num_groups < 2 * len(self.best or ()):
                    return
                graph = self._coarser(num_groups, seed)
                sets = all_sets(graph, limit, self._deadline)
            before = self._load
            self._look_in(graph, sets)
            num_failures = 0 if self._load < before else num_failures + 1
            num_groups, seed = int(num_groups / COARSER), seed + 1

    def _coarser(self, num_groups: int, seed: int) -> Contracted:
        """A graph of about that many nodes, of which the best split is a split."""
        groups = joined(self._graph, self._part_of(), num_groups, seed)
        members = self._graph.members
        together = tuple(tuple(n for node in group for n in members[node]) for group in groups)
        return contract(replace(self._problem, together=(*self._problem.together, *together)))

    def _part_of(self) -> list[int]:
        """The best split's part of every node of the graph."""
        of = {node: index for index, part in enumerate(self.best or ()) for node in part.nodes}
        return [of[members[0]] for members in self._graph.members]

    def _look_nearby(self) -> None:
        """Search the sets around the best split's, until that finds nothing better."""
        before = math.inf
        while self._load < before and not self._is_solved:
            before, part_of = self._load, self._part_of()
            cuts = range(max(part_of) + 2)
            sets = [sum(1 << n for n, part in enumerate(part_of) if part < cut) for cut in cuts]
            near = near_sets(self._graph, sets, NEAR_SETS // len(sets), self._deadline)
            self._look_in(self._graph, near)

    def _look_in(self, graph: Contracted, sets: Sets, *, is_complete: bool = False) -> None:
        """Improve the best split, and where the sets are all there are, the bound."""
        pool = make_pool(graph, sets, heavy_nodes(graph))
        self.num_sets = max(self.num_sets, len(sets))
        chains = ChainSearch(self._problem, graph, pool)
        low, step, is_last = self.bound, FIRST_STEP, False
        while not is_last and low < self._load:
            high = self._load
            is_last = high - low <= CLOSE * high
            limit = high if is_last else min(low * (1 + step), (low + high) / 2)
            found = chains.best(limit, low if is_last else limit, self._deadline)
            if found is not None and found.load_seconds < high:
                self.best = _parts(self._problem, graph, found)
            if found is None:
                low, step = limit, 2 * step
            elif is_last:
                low = found.load_seconds
            if is_complete:
                self.bound = low
