"""Down-closed sets of a contracted DAG: all of them where they are few, else chosen ones.

A set holds, with each node, all its predecessors; as an integer, bit v stands for node v. This
module knows how sets grow and shrink by a node. It does not know what a part costs.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from planner.solve.dag_contract import Contracted

__all__ = ["SetPool", "Sets", "all_sets", "make_pool", "near_sets", "nodes_of", "some_orders"]

Sets = dict[int, int]
"""Set -> the nodes that may be added to it."""
Take = Callable[[list[int]], int]
"""Takes the next node out of those that are ready, latest last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPool:
    """Sets to choose a chain from, by ascending seconds of their nodes on an accelerator."""

    masks: tuple[int, ...]
    holds: NDArray[numpy.uint8]
    """[set, node]: 1 where the set holds the node."""
    seconds: NDArray[numpy.float64]
    smaller: NDArray[numpy.int64]
    """With `larger`: pairs of sets that differ by one of the nodes named to `make_pool`.
    Ascending."""
    larger: NDArray[numpy.int64]


def nodes_of(mask: int) -> Iterator[int]:
    """Nodes of a set, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def all_sets(graph: Contracted, limit: int, deadline: float) -> Sets | None:
    """Every down-closed set, or None where there are more than `limit` or time runs out.

    `deadline` is of `time.monotonic`.
    """
    level: Sets = {0: _sources(graph)}
    found = dict(level)
    while level:
        following: Sets = {}
        for mask, available in level.items():
            if len(found) + len(following) > limit or time.monotonic() > deadline:
                return None
            for node in nodes_of(available):
                larger = mask | 1 << node
                if larger not in following:
                    following[larger] = _after(graph, larger, available, node)
        found |= following
        level = following
    return found


def _sources(graph: Contracted) -> int:
    return sum(1 << node for node, before in enumerate(graph.predecessors) if not before)


def _after(graph: Contracted, larger: int, available: int, node: int) -> int:
    """What may be added once `node` has been; `larger` is the set with it."""
    available &= ~(1 << node)
    for successor in graph.successors[node]:
        if not graph.predecessors[successor] & ~larger:
            available |= 1 << successor
    return available


def some_orders(graph: Contracted, num_random: int, seed: int) -> Sets:
    """The prefixes of several topological orders.

    They are: first come first served; the node that leaves least to move across the cut; and
    latest first (down a branch before the next one), with branches shuffled `num_random` times.
    """
    generator = random.Random(seed)
    found = _prefixes(graph, lambda ready: ready.pop(0), lambda nodes: nodes)
    found |= _prefixes(graph, _CheapestCut(graph).take, lambda nodes: nodes)
    for _ in range(num_random):
        ranks = [generator.random() for _ in range(graph.num_nodes)]
        found |= _prefixes(
            graph,
            lambda ready: ready.pop(),
            lambda nodes, ranks=ranks: sorted(nodes, key=ranks.__getitem__),  # type: ignore[misc]
        )
    return found


def _prefixes(graph: Contracted, take: Take, arrange: Callable[[list[int]], list[int]]) -> Sets:
    """Sets along the order in which `take` takes nodes; `arrange` orders those a node enables."""
    mask, available = 0, _sources(graph)
    found, ready = {mask: available}, arrange(list(nodes_of(available)))
    while ready:
        node = take(ready)
        mask |= 1 << node
        before, available = available, _after(graph, mask, available, node)
        found[mask] = available
        ready += arrange(list(nodes_of(available & ~before)))
    return found


class _CheapestCut:
    """Takes the node after which the fewest seconds of transfers are cut."""

    def __init__(self, graph: Contracted) -> None:
        self._left = [len(nodes) for nodes, _ in graph.transfers]
        self._full = list(self._left)
        self._seconds = [seconds for _, seconds in graph.transfers]
        self._of_node: list[list[int]] = [[] for _ in range(graph.num_nodes)]
        for index, (nodes, _) in enumerate(graph.transfers):
            for node in nodes:
                self._of_node[node].append(index)

    def take(self, ready: list[int]) -> int:
        node = min(reversed(ready), key=self._added)
        ready.remove(node)
        for transfer in self._of_node[node]:
            self._left[transfer] -= 1
        return node

    def _added(self, node: int) -> float:
        added = 0.0
        for transfer in self._of_node[node]:
            if self._left[transfer] == self._full[transfer]:
                added += self._seconds[transfer]
            elif self._left[transfer] == 1:
                added -= self._seconds[transfer]
        return added


def near_sets(graph: Contracted, seeds: Iterable[int], limit_each: int, deadline: float) -> Sets:
    """The sets that are fewest steps from a seed, up to a number for each; a step adds or removes
    a node. `deadline` is of `time.monotonic`: after it, the seeds alone."""
    after = [sum(1 << successor for successor in nodes) for nodes in graph.successors]
    found: Sets = {}
    for seed in seeds:
        addable = sum(
            1 << node
            for node, before in enumerate(graph.predecessors)
            if not before & ~seed and not seed >> node & 1
        )
        removable = sum(1 << node for node in nodes_of(seed) if not after[node] & seed)
        seen, queue = {seed: addable}, [(seed, addable, removable)]
        for mask, addable, removable in queue:
            if len(seen) >= limit_each or time.monotonic() > deadline:
                break
            for node in nodes_of(addable):
                step = mask | 1 << node
                if step not in seen:
                    seen[step] = _after(graph, step, addable, node)
                    fewer = removable & ~graph.predecessors[node] | 1 << node
                    queue.append((step, seen[step], fewer))
            for node in nodes_of(removable):
                step = mask ^ 1 << node
                if step not in seen:
                    seen[step] = addable & ~after[node] | 1 << node
                    more = removable ^ 1 << node
                    for before in nodes_of(graph.predecessors[node]):
                        if not after[before] & step:
                            more |= 1 << before
                    queue.append((step, seen[step], more))
        found |= seen
    return found


def make_pool(graph: Contracted, sets: Sets, steps: int) -> SetPool:
    """The pool of these sets; `steps` are the nodes whose addition makes a noted pair."""
    num_nodes, width = graph.num_nodes, (graph.num_nodes + 7) // 8
    data = b"".join(mask.to_bytes(width, "little") for mask in sets)
    packed = numpy.frombuffer(data, dtype=numpy.uint8).reshape(len(sets), width)
    holds = numpy.unpackbits(packed, axis=1, bitorder="little")[:, :num_nodes]
    seconds = holds @ graph.accelerator_seconds
    order = numpy.argsort(seconds, kind="stable")
    listed = list(sets)
    masks = tuple(listed[index] for index in order)
    position = {mask: index for index, mask in enumerate(masks)}
    pairs = [
        (index, other)
        for index, mask in enumerate(masks)
        for node in nodes_of(sets[mask] & steps)
        if (other := position.get(mask | 1 << node)) is not None
    ]
    smaller, larger = numpy.array(pairs, dtype=numpy.int64).reshape(-1, 2).T
    return SetPool(
        masks=masks,
        holds=holds[order],
        seconds=seconds[order],
        smaller=smaller,
        larger=larger,
    )
