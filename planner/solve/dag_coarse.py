"""A coarser DAG: neighbours that stand in one part of a known split, joined.

Every split of the coarser graph is one of the finer, and the known split is one of the coarser. So
the search in a coarser graph never loses, and drawing another one each time lets every boundary
move. This module knows which joins leave the graph without cycles. It does not know the solver.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Sequence

from planner.solve.dag_contract import Contracted
from planner.solve.dag_sets import nodes_of

__all__ = ["joined"]


def joined(
    graph: Contracted, part_of: Sequence[int], num_groups: int, seed: int
) -> list[tuple[int, ...]]:
    """Groups of nodes to join, until that many are left or no join is allowed any more.

    `part_of` holds each node's part. What is small is joined first, up to a draw.
    """
    return _Joins(graph, part_of, random.Random(seed)).until(num_groups)


class _Joins:
    """The graph while nodes are joined; a group is known by one of its nodes.

    An edge is joined only where it is the only one out of its first group or into its second: any
    other path between the two would have to begin or end with it.
    """

    def __init__(self, graph: Contracted, part_of: Sequence[int], draw: random.Random) -> None:
        self._part_of, self._draw = part_of, draw
        self._members = {node: [node] for node in range(graph.num_nodes)}
        self._seconds = dict(enumerate(map(float, graph.accelerator_seconds)))
        self._before = {n: set(nodes_of(mask)) for n, mask in enumerate(graph.predecessors)}
        self._after = {node: set(after) for node, after in enumerate(graph.successors)}
        self._waiting: list[tuple[float, int, int]] = []

    def until(self, num_groups: int) -> list[tuple[int, ...]]:
        for first, after in self._after.items():
            for second in after:
                self._offer(first, second)
        while len(self._members) > num_groups:
            if not self._waiting and not self._offer_twins():
                break
            _, first, second = heapq.heappop(self._waiting)
            if self._is_allowed(first, second):
                self._join(first, second)
        return [tuple(members) for members in self._members.values() if len(members) > 1]

    def _offer(self, first: int, second: int) -> None:
        weight = (self._seconds[first] + self._seconds[second]) * self._draw.uniform(0.5, 1.5)
        heapq.heappush(self._waiting, (weight, first, second))

    def _offer_twins(self) -> bool:
        """Offer pairs of groups with the same neighbours; whether there are any."""
        alike: dict[tuple[int, frozenset[int], frozenset[int]], list[int]] = defaultdict(list)
        for group in self._members:
            before, after = frozenset(self._before[group]), frozenset(self._after[group])
            alike[self._part_of[group], before, after].append(group)
        for groups in alike.values():
            groups.sort(key=self._seconds.__getitem__)
            for first, second in zip(groups[::2], groups[1::2], strict=False):
                self._offer(first, second)
        return bool(self._waiting)

    def _is_allowed(self, first: int, second: int) -> bool:
        if first not in self._members or second not in self._members:
            return False
        if self._part_of[first] != self._part_of[second]:
            return False
        if second in self._after[first]:
            return len(self._after[first]) == 1 or len(self._before[second]) == 1
        same_before = self._before[first] == self._before[second]
        return same_before and self._after[first] == self._after[second]

    def _join(self, first: int, second: int) -> None:
        """Make `second` part of `first`."""
        self._members[first] += self._members.pop(second)
        self._seconds[first] += self._seconds[second]
        for mine, theirs in ((self._before, self._after), (self._after, self._before)):
            for neighbour in mine[second]:
                theirs[neighbour].discard(second)
                if neighbour != first:
                    theirs[neighbour].add(first)
                    mine[first].add(neighbour)
            mine[first].discard(second)
        for earlier in self._before[first]:
            self._offer(earlier, first)
        for later in self._after[first]:
            self._offer(first, later)
