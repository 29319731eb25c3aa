"""Devices and links of D replicas of P pipeline ranks, as the solver needs them.

This module knows where world ranks lie in the cluster. It does not know the model.
"""

from dataclasses import dataclass

from planner.cluster.types import CollectiveAlgorithm, Device, Link
from planner.solve.problem import Problem

__all__ = ["Mesh", "make_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """What D replicas of P ranks mean on the cluster."""

    devices: tuple[Device, ...]
    """The kinds of device in use."""
    limit_bytes: tuple[int, ...]
    """Per pipeline rank: the smallest of its replicas."""
    group_link: Link
    """The slowest link of any data-parallel group."""
    ring_links: tuple[Link, ...]
    """Kinds of link between neighbours in the ring."""
    ring_kinds: tuple[int, ...]
    """Index into ring_links for the hop from each rank to the next."""
    collectives: CollectiveAlgorithm


def make_mesh(problem: Problem, replicas: int, ranks: int) -> Mesh:
    """Replicas are innermost: the world rank of (rank, replica) is rank * D + replica."""
    cluster = problem.cluster
    groups = [tuple(range(rank * replicas, (rank + 1) * replicas)) for rank in range(ranks)]
    devices = {world_rank: cluster.device(world_rank) for group in groups for world_rank in group}
    links = [
        min(
            (cluster.link(one, other) for one, other in zip(group, following, strict=True)),
            key=lambda link: link.bandwidth,
        )
        for group, following in zip(groups, [*groups[1:], groups[0]], strict=True)
    ]
    kinds = list(dict.fromkeys(links))
    return Mesh(
        devices=tuple({id(device): device for device in devices.values()}.values()),
        limit_bytes=tuple(
            min(
                problem.memory_limit_bytes
                if problem.memory_limit_bytes is not None
                else devices[world_rank].memory_bytes - devices[world_rank].reserved_bytes
                for world_rank in group
            )
            for group in groups
        ),
        group_link=min(
            (cluster.slowest_link(group) for group in groups), key=lambda link: link.bandwidth
        ),
        ring_links=tuple(kinds),
        ring_kinds=tuple(kinds.index(link) for link in links),
        collectives=cluster.collectives,
    )
