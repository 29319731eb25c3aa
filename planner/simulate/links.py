"""Which ports and adapters a transfer or a collective uses, and at what rate it goes alone.

A device has a port to its host's link and a port to the network, each with two directions (one for
both, where the link is half-duplex); the devices of a host share its network adapters. Replicas are
alike and move together, so the simulator has one flow where the cluster has one for each replica.
That flow uses a port as often as the busiest replica uses its own, because every replica has a
port to itself; and it uses an adapter as often as all replicas together, because they share it. So
a rank's transfer counts once for every replica whose device and peer are on different hosts, one of
them on the adapter's. World ranks fill the hosts in order.

A collective counts the messages of its busiest round. This module does not know who uses a link
when: see `sharing`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from planner.cluster.types import Cluster, Link
from planner.cost import num_rounds
from planner.layouts import Grid

__all__ = ["Edge", "Links", "Path"]

Edge = tuple[int, int]
"""World ranks of a sender and its receiver."""
_Use = tuple[str, int, Link, str]
"""`port` or `network` and a world rank, or `adapters` and a host; the link; the direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """What one flow occupies."""

    latency_seconds: float
    """Before the last byte arrives, whatever the rate."""
    rate: float
    """Bytes per second of one member while nothing else uses its links."""
    contended: tuple[tuple[int, int], ...]
    """(resource, bytes there per byte of the flow), for resources that other flows can slow."""
    counted: tuple[tuple[str, int], ...]
    """The same by name, with adapters that are never short."""


@dataclass(slots=True, kw_only=True)
class Links:
    """Paths on one cluster, under one arrangement of pipeline ranks and replicas."""

    cluster: Cluster
    grid: Grid
    capacities: list[float] = field(default_factory=list)
    """Bytes per second of each resource."""
    _numbers: dict[str, int] = field(default_factory=dict)
    _paths: dict[tuple[object, ...], tuple[Path, ...]] = field(default_factory=dict)
    _is_ambiguous: bool = False
    """A host's own link has the name of one between hosts."""

    def __post_init__(self) -> None:
        between = {self.cluster.network.name, *(own.link.name for own in self.cluster.host_links)}
        self._is_ambiguous = any(host.link.name in between for host in self.cluster.hosts)

    def transfer(self, rank: int, peer: int) -> Path:
        """From one pipeline rank to another, on every replica at once."""
        key = ("transfer", rank, peer)
        if key not in self._paths:
            edges = list(zip(self._replicas(rank), self._replicas(peer), strict=True))
            self._paths[key] = (self._path([edges], 1),)
        return self._paths[key][0]

    def over_replicas(self, rank: int, num_bytes: float, *, num_passes: int) -> Path:
        """A collective of one pipeline rank's replicas.

        Args:
            num_bytes: what leaves each member.
            num_passes: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
        """
        key = ("replicas", rank, num_passes)
        if key not in self._paths:
            self._paths[key] = self._collective([self._replicas(rank)], num_passes)
        return _quickest(self._paths[key], num_bytes)

    def over_parts(self, rank: int, num_bytes: float, *, num_passes: int) -> Path:
        """The same inside each partition group of those replicas, in all groups at once."""
        key = ("parts", rank, num_passes)
        if key not in self._paths:
            self._paths[key] = self._collective(self.grid.partition_groups(rank), num_passes)
        return _quickest(self._paths[key], num_bytes)

    def over_groups(self, rank: int, num_bytes: float, *, num_passes: int) -> Path:
        """The same among those that have the same part in their groups, for all parts at once."""
        key = ("groups", rank, num_passes)
        if key not in self._paths:
            self._paths[key] = self._collective(self.grid.part_holders(rank), num_passes)
        return _quickest(self._paths[key], num_bytes)

    def over_ranks(self, ranks: Sequence[int], num_bytes: float, *, num_passes: int) -> Path:
        """The same over pipeline ranks, on every replica at once."""
        key = ("ranks", *ranks, num_passes)
        if key not in self._paths:
            rows = zip(*(self._replicas(rank) for rank in ranks), strict=True)
            self._paths[key] = self._collective([list(row) for row in rows], num_passes)
        return _quickest(self._paths[key], num_bytes)

    def over_all(self, num_bytes: float, *, num_passes: int) -> Path:
        """The same over every rank and replica."""
        key = ("all", num_passes)
        if key not in self._paths:
            everyone = range(self.grid.world_size)
            self._paths[key] = self._collective([everyone], num_passes)
        return _quickest(self._paths[key], num_bytes)

    def rates(self) -> dict[str, float]:
        """Bytes per second of each port and adapter of the paths asked for so far, by name; those
        that are never short are left out."""
        return {name: self.capacities[number] for name, number in self._numbers.items()}

    def _replicas(self, rank: int) -> Sequence[int]:
        return self.grid.replicas_of(rank)

    def _collective(self, groups: Sequence[Sequence[int]], num_passes: int) -> tuple[Path, ...]:
        """A path per algorithm in question. All groups are of one size and move together."""
        wanted, size = self.cluster.collectives, len(groups[0])
        algorithms: tuple[Literal["ring", "tree"], ...] = ("ring", "tree")
        return tuple(
            self._path(_rounds(groups, algorithm), num_passes * num_rounds(size, algorithm))
            for algorithm in algorithms
            if wanted in (algorithm, "auto")
        )

    def _path(self, rounds: Iterable[Iterable[Edge]], num_messages: int) -> Path:
        """`num_messages` follow one another; the busiest round stands for all."""
        busiest: Counter[_Use] = Counter()
        latency = 0.0
        for edges in rounds:
            uses: Counter[_Use] = Counter()
            for edge in edges:
                link = self._use(edge, uses)
                latency = max(latency, link.latency_seconds)
            busiest |= uses  # the larger count of each
        named: dict[str, tuple[float, int]] = {}
        for (kind, place, link, direction), number in busiest.items():
            if kind == "adapters":
                name = f"adapters of host {place}, {direction}"
                capacity = self.cluster.hosts[place].adapter_bandwidth or float("inf")
            else:
                between = " between hosts" if kind == "network" and self._is_ambiguous else ""
                rank, _ = self.grid.coordinates(place)
                name = f"{link.name} port of rank {rank}{between}, {direction}"
                capacity = link.bandwidth
            known = named.get(name, (capacity, 0))
            named[name] = (min(capacity, known[0]), max(number, known[1]))
        limits = [capacity / number for capacity, number in named.values()]
        return Path(
            latency_seconds=num_messages * latency,
            rate=min(limits, default=float("inf")),
            contended=tuple(
                (self._number(name, capacity), number)
                for name, (capacity, number) in named.items()
                if capacity < float("inf")
            ),
            counted=tuple((name, number) for name, (_, number) in named.items()),
        )

    def _use(self, edge: Edge, uses: Counter[_Use]) -> Link:
        """Count the ports and adapters that one message passes; returns its link."""
        source, destination = edge
        hosts = self.cluster.host_index(source), self.cluster.host_index(destination)
        inside = hosts[0] == hosts[1]
        link = self.cluster.link(source, destination)
        for place, host, direction in ((source, hosts[0], "out"), (destination, hosts[1], "in")):
            way = direction if link.duplex else "both ways"
            uses["port" if inside else "network", place, link, way] += 1
            if not inside:
                uses["adapters", host, link, way] += 1
        return link

    def _number(self, name: str, capacity: float) -> int:
        """The resource of a name; ranks that straddle unequal hosts have the slower port."""
        number = self._numbers.setdefault(name, len(self.capacities))
        if number == len(self.capacities):
            self.capacities.append(capacity)
        self.capacities[number] = min(self.capacities[number], capacity)
        return number


def _quickest(paths: Sequence[Path], num_bytes: float) -> Path:
    return min(paths, key=lambda path: path.latency_seconds + num_bytes / path.rate)


def _rounds(
    groups: Sequence[Sequence[int]], algorithm: Literal["ring", "tree"]
) -> list[list[Edge]]:
    """Who sends to whom, round by round; rounds of a ring are alike, so there is one.

    Round k of the tree sends to the member 2^k places before (Bruck et al., see `planner.cost`).
    """
    size = len(groups[0])
    if size == 1:
        return []
    powers = [1 << k for k in range(num_rounds(size, "tree"))]
    distances = [-1] if algorithm == "ring" else powers
    return [
        [(group[i], group[(i - distance) % size]) for group in groups for i in range(size)]
        for distance in distances
    ]
