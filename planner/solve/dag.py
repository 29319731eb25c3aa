"""A DAG of weighted nodes into contiguous parts, one per device, so that the largest load is least.

A part is *contiguous* where it is the difference of two down-closed sets, so that parts can stand
in a pipeline: the parts are a chain of down-closed sets. An accelerator's load is the seconds of
its nodes and of what it must move: each transfer that its part has only some of the nodes of is
paid once. A host pays for its nodes alone and has no memory limit. Nodes may have to stand
together, which is how the forward and the backward nodes of a training graph share a device.

This module knows the problem and what a part costs. It does not know how a part is found.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from planner.errors import UsageError

__all__ = [
    "DagNode",
    "DagPart",
    "DagProblem",
    "DagSolution",
    "Transfer",
    "part_bytes",
    "part_load",
    "require_valid",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DagNode:
    """The smallest unit that is placed."""

    accelerator_seconds: float
    """Infinite where an accelerator cannot run it."""
    host_seconds: float = math.inf
    """Infinite where a host cannot run it."""
    num_bytes: float = 0.0
    """Of an accelerator's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What a node makes, moved between an accelerator and the rest of the world."""

    maker: int
    readers: tuple[int, ...]
    seconds: float
    """Paid once by a part that holds the maker but not all readers, and by one that holds a reader
    but not the maker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DagProblem:
    """What to split, and on what. Seconds and bytes may be of any unit, the same throughout."""

    nodes: tuple[DagNode, ...]
    edges: tuple[tuple[int, int], ...]
    """(earlier, later): no part order may turn it round. A cycle's nodes stand together."""
    transfers: tuple[Transfer, ...]
    together: tuple[tuple[int, ...], ...] = ()
    """Groups of nodes that share a part."""
    num_accelerators: int
    num_hosts: int = 0
    memory_limit_bytes: float = math.inf
    """Of each accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DagPart:
    """What one device holds."""

    is_host: bool
    nodes: tuple[int, ...]
    """Ascending."""
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DagSolution:
    """Parts in pipeline order: no edge leads from a later part to an earlier one."""

    parts: tuple[DagPart, ...]
    """None is empty; at most one for each device."""
    bound_seconds: float
    """No split has a smaller largest load."""
    num_sets: int
    """Down-closed sets that were looked at."""
    is_complete: bool
    """Those are all of them: the search was over the whole space."""

    @property
    def load_seconds(self) -> float:
        """The largest load."""
        return max((part.load_seconds for part in self.parts), default=0.0)

    @property
    def gap(self) -> float:
        """(load - bound) / load, 0 where proved least."""
        load = self.load_seconds
        return max(0.0, 1.0 - self.bound_seconds / load) if load else 0.0


def part_load(problem: DagProblem, nodes: Collection[int], *, is_host: bool) -> float:
    """Seconds of a device that holds these nodes, by the definition; infinite where it cannot."""
    held = set(nodes)
    if is_host:
        return math.fsum(problem.nodes[node].host_seconds for node in held)
    moved = [
        transfer.seconds
        for transfer in problem.transfers
        if (
            not held.issuperset(transfer.readers)
            if transfer.maker in held
            else not held.isdisjoint(transfer.readers)
        )
    ]
    own = [problem.nodes[node].accelerator_seconds for node in held]
    return math.fsum(itertools.chain(own, moved))


def part_bytes(problem: DagProblem, nodes: Iterable[int]) -> float:
    """Bytes that an accelerator needs for these nodes."""
    return math.fsum(problem.nodes[node].num_bytes for node in nodes)


def require_valid(problem: DagProblem) -> None:
    """Refuse what no split could be of.

    Raises:
        UsageError: a negative figure, a node that does not exist, or no device.
    """
    known = range(len(problem.nodes))
    named: Sequence[Iterable[int]] = (
        *problem.edges,
        *problem.together,
        *((transfer.maker, *transfer.readers) for transfer in problem.transfers),
    )
    for name in itertools.chain.from_iterable(named):
        if name not in known:
            raise UsageError(
                f"the graph names node {name}, but has {len(known)} nodes, from 0 on",
                hint="number the nodes by their position",
            )
    figures: list[tuple[str, float]] = [
        *((f"seconds of the transfer of node {t.maker}", t.seconds) for t in problem.transfers),
        ("memory_limit_bytes", problem.memory_limit_bytes),
        ("num_accelerators", problem.num_accelerators),
        ("num_hosts", problem.num_hosts),
    ]
    for index, node in enumerate(problem.nodes):
        figures += [
            (f"accelerator_seconds of node {index}", node.accelerator_seconds),
            (f"host_seconds of node {index}", node.host_seconds),
            (f"num_bytes of node {index}", node.num_bytes),
        ]
    for figure, value in figures:
        if not value >= 0:
            raise UsageError(f"{figure} is {value}, not 0 or more", hint="correct the graph")
    if problem.num_accelerators + problem.num_hosts < 1:
        raise UsageError(
            "num_accelerators and num_hosts are both 0: there is no device",
            hint="name at least one",
        )
