"""Devices and links of D replicas of P pipeline ranks, as the solver needs them.

A collective goes at the pace of its slowest link; where a host's devices share its network
adapters, each link has its part of them. This module knows where world ranks lie in the cluster. It
does not know the model.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.cluster.types import Cluster, CollectiveAlgorithm, Device, Link
from planner.layouts import Grid
from planner.solve.problem import Problem

__all__ = ["Ground", "Mesh", "RankKind"]

_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKind:
    """What the replicas of a pipeline rank run on."""

    devices: tuple[Device, ...]
    """The kinds of device among them."""
    group_link: Link
    """The slowest link between them."""
    part_link: Link
    """Likewise inside their partition groups, all of them at work."""
    copy_link: Link
    """Likewise between those that have the same part, of all parts at once."""
    updaters: tuple[Device, ...] = ()
    """What updates their state: themselves, or their hosts."""


@dataclass(slots=True, kw_only=True)
class Mesh:
    """What D replicas of P ranks mean on the cluster."""

    ground: "Ground"
    grid: Grid
    kinds: tuple[RankKind, ...]
    rank_kinds: tuple[int, ...]
    """Index into kinds of each pipeline rank."""
    limit_bytes: tuple[int, ...]
    """Per pipeline rank: the smallest of its replicas."""
    collectives: CollectiveAlgorithm
    _links: dict[tuple[int, int], Link] = field(default_factory=dict)

    def link(self, rank: int, other: int) -> Link:
        """From one pipeline rank to another: the slowest of all replicas'."""
        key = (rank, other)
        if key not in self._links:
            ends = (np.array(self.grid.replicas_of(one)) for one in key)
            self._links[key] = self.ground.slowest(*ends)
        return self._links[key]


@dataclass(slots=True, kw_only=True)
class Ground:
    """A problem's cluster, with the host of every world rank."""

    cluster: Cluster
    memory_limit_bytes: int | None
    updates_on_host: bool = False
    _hosts: _Ints = field(init=False)
    """By world rank."""
    _kinds: _Ints = field(init=False)
    """Kind of device by host: the first host that has it."""
    _updaters: _Ints = field(init=False)
    """The first host that updates as fast, by host; the device's kind where that updates."""
    _limits: _Ints = field(init=False)
    """Bytes by host."""

    def __post_init__(self) -> None:
        hosts = self.cluster.hosts
        self._hosts = np.repeat(np.arange(len(hosts)), [host.num_devices for host in hosts])
        firsts: dict[int, int] = {}
        self._kinds = np.array(
            [firsts.setdefault(id(host.device), index) for index, host in enumerate(hosts)]
        )
        self._updaters = self._kinds
        if self.updates_on_host:
            rates: dict[tuple[float, float], int] = {}
            keys = [(h.updater.memory_bandwidth, h.updater.kernel_overhead_seconds) for h in hosts]
            self._updaters = np.array([rates.setdefault(key, i) for i, key in enumerate(keys)])
        self._limits = np.array(
            [
                host.device.usable_bytes
                if self.memory_limit_bytes is None
                else self.memory_limit_bytes
                for host in hosts
            ]
        )

    @classmethod
    def of(cls, problem: Problem) -> "Ground":
        return cls(
            cluster=problem.cluster,
            memory_limit_bytes=problem.memory_limit_bytes,
            updates_on_host=problem.updates_on_host,
        )

    def mesh(self, grid: Grid) -> Mesh:
        """Where the grid puts every replica of every rank."""
        kinds: dict[Any, int] = {}
        found: list[RankKind] = []
        rank_kinds, limits = [], []
        for rank in range(grid.num_pipeline_ranks):
            members = np.array(grid.replicas_of(rank))
            hosts = self._hosts[members]
            used = np.unique(hosts)
            devices = tuple(np.unique(self._kinds[used]).tolist())
            limits.append(int(self._limits[used].min()))
            links = [self._group_link(members[None], used)] * 3
            if grid.num_parts < grid.num_replicas:
                groups = members.reshape(-1, grid.num_parts)
                links[1:] = self._group_link(groups, used), self._group_link(groups.T, used)
            updaters = tuple(np.unique(self._updaters[used]).tolist())
            key = (devices, *links, updaters)
            if key not in kinds:
                kinds[key] = len(found)
                found.append(
                    RankKind(
                        devices=tuple(self.cluster.hosts[index].device for index in devices),
                        group_link=links[0],
                        part_link=links[1],
                        copy_link=links[2],
                        updaters=tuple(map(self._updater, updaters)),
                    )
                )
            rank_kinds.append(kinds[key])
        return Mesh(
            ground=self,
            grid=grid,
            kinds=tuple(found),
            rank_kinds=tuple(rank_kinds),
            limit_bytes=tuple(limits),
            collectives=self.cluster.collectives,
        )

    def _updater(self, index: int) -> Device:
        host = self.cluster.hosts[index]
        return host.updater if self.updates_on_host else host.device

    def _group_link(self, groups: _Ints, hosts: _Ints) -> Link:
        """Between the members of groups (rows) that work at once; each sends to the next one."""
        if len(hosts) == 1:
            return self.cluster.hosts[int(hosts[0])].link
        return self.slowest(groups.ravel(), np.roll(groups, -1, axis=1).ravel())

    def slowest(self, sources: _Ints, destinations: _Ints) -> Link:
        """Of links in use at once, from each source to its destination."""
        num_hosts = len(self.cluster.hosts)
        here, there = self._hosts[sources], self._hosts[destinations]
        # One message stands for all that go from one host to another.
        _, firsts = np.unique(here * num_hosts + there, return_index=True)
        links: dict[Link, list[int]] = {}
        for first in firsts.tolist():
            link = self.cluster.link(int(sources[first]), int(destinations[first]))
            links.setdefault(link, []).append(first)
        leaves = here != there
        shared = [
            self._shared(link, here[leaves], there[leaves]) if leaves[firsts_of].any() else link
            for link, firsts_of in links.items()
        ]
        slowest: Link = min(shared, key=lambda link: link.bandwidth)
        latency = max(link.latency_seconds for link in shared)
        return replace(slowest, latency_seconds=latency)

    def _shared(self, link: Link, sources: _Ints, destinations: _Ints) -> Link:
        """A link between hosts, each message with its share of the adapters at both of its ends."""
        bandwidth = link.bandwidth
        ways = [sources, destinations]
        if not link.duplex:
            ways = [np.concatenate(ways)]
        for ends in ways:
            for host, number in zip(*np.unique(ends, return_counts=True), strict=True):
                adapters = self.cluster.hosts[int(host)].adapter_bandwidth
                if adapters is not None:
                    bandwidth = min(bandwidth, adapters / int(number))
        return replace(link, bandwidth=bandwidth)
