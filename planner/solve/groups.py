"""Which replicas divide a partitioned state among them: all of a pipeline rank, or groups of them.

Where nothing is demanded they are all of them, or those of a host: what is gathered stays inside
the host then. This module knows what is demanded of groups, and where replicas are. It does not
know what a group costs.
"""

import itertools
import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from planner.layouts import Grid
from planner.solve.problem import Problem
from planner.solve.types import Placement

__all__ = ["partition_group_sizes", "with_groups"]


def partition_group_sizes(problem: Problem, grid: Grid) -> tuple[int, ...]:
    """Of the groups that may divide a state, the largest first; 0: all replicas. None where the
    mesh has no such groups, and its state is whole."""
    within, replicas = problem.constraints.partition_within, grid.num_replicas
    sizes = [replicas] if within is None else []
    if within is None or within == "host":
        sizes.append(_within_hosts(tuple(h.num_devices for h in problem.cluster.hosts), grid))
    elif replicas % within == 0:
        sizes.append(within)
    found = {size % replicas for size in sizes if size > 1}
    return tuple(sorted(found, key=lambda size: -(size or replicas)))


def with_groups(problem: Problem, placement: Placement) -> Placement | None:
    """The placement, with groups that it may have; None where its state is partitioned, and its
    mesh has none."""
    if not placement.partition:
        return replace(placement, partition_group_size=0)
    sizes = partition_group_sizes(problem, placement.grid)
    if placement.partition_group_size in sizes:
        return placement
    return replace(placement, partition_group_size=sizes[0]) if sizes else None


@lru_cache(maxsize=4096)
def _within_hosts(num_devices: tuple[int, ...], grid: Grid) -> int:
    """The largest groups, equal and of consecutive replicas, of which none leaves its host."""
    size = grid.num_replicas
    ranks = [grid.replicas_of(rank) for rank in range(grid.num_pipeline_ranks)]
    starts, step = np.array([replicas[0] for replicas in ranks]), 1
    if size > 1:
        step = ranks[0][1] - ranks[0][0]
    for first in itertools.accumulate(num_devices):
        if first >= grid.world_size or size == 1:
            break
        # Where the replicas of the next host begin, so does a group.
        places = np.clip(-(-(first - starts) // step), 0, grid.num_replicas)
        size = math.gcd(size, int(np.gcd.reduce(places)))
    return size
