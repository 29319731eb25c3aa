"""Which replicas divide a partitioned state among them: all of a pipeline rank, or groups of them.

This module knows what is demanded of groups, and where replicas are. It does not know what a group
costs.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from planner.layouts import Grid
from planner.solve.problem import Problem
from planner.solve.types import Placement

__all__ = ["partition_group_size", "with_groups"]


def partition_group_size(problem: Problem, grid: Grid) -> int:
    """Of the groups that are demanded; 0: all replicas; 1: the mesh has no such groups, and its
    state is whole."""
    within, replicas = problem.constraints.partition_within, grid.num_replicas
    if within is None:
        size = replicas
    elif within == "host":
        size = _within_hosts(tuple(host.num_devices for host in problem.cluster.hosts), grid)
    else:
        size = 1 if replicas % within else within
    return size if size < replicas or replicas == 1 else 0


def with_groups(problem: Problem, placement: Placement) -> Placement | None:
    """The placement with the groups that are demanded; None where its state is partitioned, and its
    mesh has none."""
    size = partition_group_size(problem, placement.grid) if placement.partition else 0
    return None if size == 1 else replace(placement, partition_group_size=size)


@lru_cache(maxsize=1024)
def _within_hosts(num_devices: Sequence[int], grid: Grid) -> int:
    """The largest groups, equal and of consecutive replicas, of which none leaves its host."""
    size = grid.num_replicas
    firsts = list(itertools.accumulate(num_devices))
    for rank in range(grid.num_pipeline_ranks):
        replicas = grid.replicas_of(rank)
        for first in firsts:
            if first > replicas[-1] or size == 1:
                break
            # Where the replicas of the next host begin, so does a group.
            size = math.gcd(size, bisect_left(replicas, first))
    return size
