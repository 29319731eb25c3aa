"""Every mesh and batching that a problem allows, far too many to try, few enough to bound.

D replicas of P pipeline ranks on at most the devices there are, and M micro-batches of b samples
with D M b the global batch. This module knows counts. It does not know seconds or bytes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import UsageError
from planner.layouts import Grid, Layout
from planner.solve.choices import Choice, demands, divisors
from planner.solve.groups import partition_group_sizes
from planner.solve.problem import Problem

__all__ = ["Batching", "Options", "all_options", "batchings", "choice_of", "layouts"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Batching:
    """A mesh, and what one replica does in a step."""

    num_replicas: int
    num_pipeline_ranks: int
    micro_batch_size: int
    num_micro_batches: int

    @property
    def mesh(self) -> tuple[int, int]:
        return self.num_replicas, self.num_pipeline_ranks


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Options:
    """Choices that decide what must stand in memory."""

    partition: int
    offload_state: bool
    offload_inputs: bool
    partition_group_size: int = 0
    """Replicas that divide the state among them; 0: all, or nothing is divided."""


def batchings(problem: Problem, num_layers: int) -> list[Batching]:
    """All of them that the demands allow.

    Raises:
        UsageError: there is none.
    """
    found = [
        batching
        for replicas, size, count in _batches(problem)
        for ranks in _ranks(problem, replicas, num_layers)
        if all_options(
            problem,
            batching := Batching(
                num_replicas=replicas,
                num_pipeline_ranks=ranks,
                micro_batch_size=size,
                num_micro_batches=count,
            ),
        )
    ]
    if not found:
        raise UsageError(
            f"no mesh of up to {problem.num_devices} devices serves a global batch of "
            f"{problem.global_batch_size} samples with {demands(problem.constraints)}",
            hint="leave one of these choices free (a partitioned state needs two replicas that "
            "divide it)",
        )
    return found


def _group_sizes(problem: Problem, replicas: int, ranks: int) -> list[int]:
    """Of the groups that may divide the state: largest first, 0 for all replicas."""
    sizes = {
        size
        for layout in _layouts(problem, replicas, ranks)
        for size in partition_group_sizes(
            problem, Grid(num_replicas=replicas, num_pipeline_ranks=ranks, layout=layout)
        )
    }
    return sorted(sizes, key=lambda size: -(size or replicas))


def _batches(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(replicas, size, count) whose product is the batch."""
    wanted = problem.constraints
    for replicas in divisors(problem.global_batch_size):
        if replicas > problem.num_devices or wanted.num_replicas not in (None, replicas):
            continue
        per_replica = problem.global_batch_size // replicas
        for size in divisors(per_replica):
            count = per_replica // size
            if wanted.micro_batch_size in (None, size) and (
                wanted.num_micro_batches in (None, count)
            ):
                yield replicas, size, count


def _ranks(problem: Problem, replicas: int, num_layers: int) -> Iterator[int]:
    wanted = problem.constraints
    most = min(problem.num_devices // replicas, num_layers // (wanted.stages_per_rank or 1))
    if wanted.num_pipeline_ranks is None:
        yield from range(1, most + 1)
    elif wanted.num_pipeline_ranks <= most:
        yield wanted.num_pipeline_ranks


def all_options(problem: Problem, batching: Batching) -> list[Options]:
    """Those that the demands allow, the plainest first."""
    wanted, sizes = problem.constraints, _group_sizes(problem, *batching.mesh)
    partitions = [(0, 0), *itertools.product((1, 2, 3), sizes)]
    return [
        Options(
            partition=partition,
            offload_state=state,
            offload_inputs=inputs,
            partition_group_size=size,
        )
        for state, inputs, (partition, size) in itertools.product(
            (False, True), (False, True), partitions
        )
        if wanted.allows(partition, offload_state=state) and wanted.offload_inputs in (None, inputs)
    ]


def layouts(problem: Problem, batching: Batching, options: Options) -> list[Layout]:
    """Arrangements of world ranks that differ, and have the groups of these options: one where
    everybody is on one host."""
    replicas, ranks = batching.mesh
    found = _layouts(problem, replicas, ranks)
    if not options.partition:
        return found
    grids = [
        Grid(num_replicas=replicas, num_pipeline_ranks=ranks, layout=layout) for layout in found
    ]
    wanted = options.partition_group_size
    return [grid.layout for grid in grids if wanted in partition_group_sizes(problem, grid)]


def _layouts(problem: Problem, replicas: int, ranks: int) -> list[Layout]:
    inside = replicas * ranks <= problem.cluster.hosts[0].num_devices
    return [Layout.REPLICAS_INSIDE] if inside or 1 in (replicas, ranks) else list(Layout)


def choice_of(
    problem: Problem,
    batching: Batching,
    options: Options,
    *,
    stages_per_rank: int,
    num_buffers: int = 2,
) -> Choice:
    """All choices together, in the first layout that they go with; recompute is left to the split
    unless it is demanded."""
    return Choice(
        num_replicas=batching.num_replicas,
        num_pipeline_ranks=batching.num_pipeline_ranks,
        stages_per_rank=stages_per_rank,
        micro_batch_size=batching.micro_batch_size,
        num_micro_batches=batching.num_micro_batches,
        partition=options.partition,
        recompute=problem.constraints.recompute,
        offload_state=options.offload_state,
        offload_inputs=options.offload_inputs,
        num_buffers=problem.constraints.num_buffers or num_buffers,
        layout=layouts(problem, batching, options)[0],
        partition_group_size=options.partition_group_size,
    )
