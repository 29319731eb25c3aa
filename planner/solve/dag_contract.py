"""A DagProblem with every set of nodes that must, or may as well, stand together made one node.

Merged are: groups, cycles, and a node without work that has a single neighbour (beside it costs
nothing, elsewhere it may). This module knows what never changes the least load. It does not know
how to split.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import networkx
import numpy
from numpy.typing import NDArray

from planner.solve.dag import DagProblem

__all__ = ["Contracted", "contract"]

Floats = NDArray[numpy.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contracted:
    """The graph that is searched; its nodes are numbered in a topological order."""

    members: tuple[tuple[int, ...], ...]
    """Nodes of the problem in each of its own."""
    accelerator_seconds: Floats
    """0 where an accelerator cannot run it."""
    host_seconds: Floats
    """0 where a host cannot run it."""
    num_bytes: Floats
    needs_host: NDArray[numpy.bool_]
    needs_accelerator: NDArray[numpy.bool_]
    predecessors: tuple[int, ...]
    """Bit mask of each node's direct predecessors."""
    successors: tuple[tuple[int, ...], ...]
    transfers: tuple[tuple[tuple[int, ...], float], ...]
    """(nodes, seconds): a part that holds some of the nodes, not all, pays."""

    @property
    def num_nodes(self) -> int:
        return len(self.members)


class _Groups:
    """Union-find over the problem's nodes."""

    def __init__(self, num_nodes: int) -> None:
        self._parent = list(range(num_nodes))

    def of(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def join(self, nodes: Iterable[int]) -> None:
        for one, other in pairwise(nodes):
            self._parent[self.of(one)] = self.of(other)


def contract(problem: DagProblem) -> Contracted:
    """The smallest graph with the same least load that these rules give."""
    groups = _Groups(len(problem.nodes))
    for group in problem.together:
        groups.join(group)
    for cycle in networkx.strongly_connected_components(_graph(problem, groups)):
        groups.join(cycle)
    while _join_idle(problem, groups):
        pass
    return _contracted(problem, groups)


def _graph(problem: DagProblem, groups: _Groups) -> "networkx.DiGraph[int]":
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(groups.of(node) for node in range(len(problem.nodes)))
    edges = {(groups.of(first), groups.of(second)) for first, second in problem.edges}
    graph.add_edges_from((first, second) for first, second in sorted(edges) if first != second)
    return graph


def _members(problem: DagProblem, groups: _Groups) -> dict[int, list[int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for node in range(len(problem.nodes)):
        members[groups.of(node)].append(node)
    return members


def _transfers(problem: DagProblem, groups: _Groups) -> dict[frozenset[int], float]:
    """Seconds by the groups a transfer joins; those within one group cost nothing."""
    found: dict[frozenset[int], float] = defaultdict(float)
    for transfer in problem.transfers:
        touched = frozenset(groups.of(node) for node in (transfer.maker, *transfer.readers))
        if len(touched) > 1 and transfer.seconds > 0:
            found[touched] += transfer.seconds
    return found


def _join_idle(problem: DagProblem, groups: _Groups) -> bool:
    """Join groups without work to their only neighbour; whether there was one.

    With all its transfers shared with that neighbour, a part that holds the neighbour pays no more
    with the group than without it, and the part that the group leaves pays less.
    """
    graph, members = _graph(problem, groups), _members(problem, groups)
    memory_is_loose = (
        math.fsum(node.num_bytes for node in problem.nodes) <= problem.memory_limit_bytes
    )
    touching: dict[int, list[frozenset[int]]] = defaultdict(list)
    for touched in _transfers(problem, groups):
        for group in touched:
            touching[group].append(touched)
    busy: set[int] = set()
    for group in graph:
        neighbours = {*graph.predecessors(group), *graph.successors(group)}
        nodes = [problem.nodes[node] for node in members[group]]
        if (
            len(neighbours) == 1
            and busy.isdisjoint({group, *neighbours})
            and not any(node.accelerator_seconds or node.host_seconds for node in nodes)
            and (memory_is_loose or not any(node.num_bytes for node in nodes))
            and all(neighbours <= touched for touched in touching[group])
        ):
            busy |= {group, *neighbours}
            groups.join((group, *neighbours))
    return bool(busy)


def _contracted(problem: DagProblem, groups: _Groups) -> Contracted:
    graph, members = _graph(problem, groups), _members(problem, groups)
    order = list(networkx.lexicographical_topological_sort(graph, key=lambda g: members[g][0]))
    position = {group: index for index, group in enumerate(order)}
    masks = [sum(1 << position[p] for p in graph.predecessors(group)) for group in order]
    own = [[problem.nodes[node] for node in members[group]] for group in order]
    accelerator = numpy.array([math.fsum(n.accelerator_seconds for n in nodes) for nodes in own])
    host = numpy.array([math.fsum(n.host_seconds for n in nodes) for nodes in own])
    return Contracted(
        members=tuple(tuple(members[group]) for group in order),
        accelerator_seconds=numpy.where(numpy.isinf(accelerator), 0.0, accelerator),
        host_seconds=numpy.where(numpy.isinf(host), 0.0, host),
        num_bytes=numpy.array([math.fsum(n.num_bytes for n in nodes) for nodes in own]),
        needs_host=numpy.isinf(accelerator),
        needs_accelerator=numpy.isinf(host),
        predecessors=tuple(masks),
        successors=tuple(
            tuple(sorted(position[s] for s in graph.successors(group))) for group in order
        ),
        transfers=tuple(
            sorted(
                (tuple(sorted(position[group] for group in touched)), seconds)
                for touched, seconds in _transfers(problem, groups).items()
            )
        ),
    )
