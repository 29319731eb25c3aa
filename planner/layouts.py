"""Which world rank is which replica's which pipeline rank.

World ranks fill the hosts of a cluster in order, so their numbering decides what stays inside a
host. A partitioned state is divided among a group of consecutive replicas, and every group has all
of it; those that have the same part of it, one in each group, hold copies of each other's.
This module knows the arithmetic of ranks. It does not know clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Grid", "Layout"]


class Layout(StrEnum):
    """Which neighbours in the mesh have neighbouring world ranks, and so share a host.

    Two orders are enough: a collective goes at the pace of its slowest member, so a group that
    leaves a host gains nothing from the members it leaves there.
    """

    REPLICAS_INSIDE = "replicas inside"
    """The replicas of a pipeline rank: gathers and reductions stay inside hosts."""
    PIPELINE_INSIDE = "pipeline inside"
    """The pipeline ranks of a replica: boundary tensors stay inside hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The world ranks of D replicas of P pipeline ranks: rank * D + replica, or replica * P + rank.

    Within a replica, and within the replicas of a rank, world ranks ascend.
    """

    num_replicas: int
    num_pipeline_ranks: int
    layout: Layout = Layout.REPLICAS_INSIDE
    partition_group_size: int = 0
    """Consecutive replicas that divide a state among them; 0: all."""

    @property
    def world_size(self) -> int:
        return self.num_replicas * self.num_pipeline_ranks

    @property
    def num_parts(self) -> int:
        """Of a state that is partitioned."""
        return self.partition_group_size or self.num_replicas

    def world_rank(self, pipeline_rank: int, replica: int) -> int:
        if self.layout is Layout.PIPELINE_INSIDE:
            return replica * self.num_pipeline_ranks + pipeline_rank
        return pipeline_rank * self.num_replicas + replica

    def coordinates(self, world_rank: int) -> tuple[int, int]:
        """(pipeline rank, replica) of a world rank."""
        if self.layout is Layout.PIPELINE_INSIDE:
            replica, pipeline_rank = divmod(world_rank, self.num_pipeline_ranks)
            return pipeline_rank, replica
        pipeline_rank, replica = divmod(world_rank, self.num_replicas)
        return pipeline_rank, replica

    def replicas_of(self, pipeline_rank: int) -> Sequence[int]:
        """World ranks of a pipeline rank, in order of replicas: a data-parallel group."""
        first = self.world_rank(pipeline_rank, 0)
        step = self.num_pipeline_ranks if self.layout is Layout.PIPELINE_INSIDE else 1
        return range(first, first + step * self.num_replicas, step)

    def partition_groups(self, pipeline_rank: int) -> list[Sequence[int]]:
        """World ranks of a pipeline rank that divide a state, group by group, in order of parts."""
        replicas, size = self.replicas_of(pipeline_rank), self.num_parts
        return [replicas[first : first + size] for first in range(0, len(replicas), size)]

    def part_holders(self, pipeline_rank: int) -> list[Sequence[int]]:
        """World ranks of a pipeline rank that have the same part, one in each group, by part."""
        replicas, size = self.replicas_of(pipeline_rank), self.num_parts
        return [replicas[part::size] for part in range(size)]
