"""What a search of other schedules chooses from: meshes and batches under each schedule.

This module knows which choices go with which schedule, and which candidates are alike. It does not
know what any of them comes to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner.explain.order_model import OrderModel
from planner.schedules import Schedule
from planner.solve import Problem
from planner.solve.choices import Choice
from planner.solve.groups import partition_group_sizes
from planner.solve.types import Split

__all__ = ["Candidate", "Kind", "Mesh", "candidates_of", "hybrid_group_sizes"]

_LOOPED = (Schedule.INTERLEAVED, Schedule.HYBRID)
"""Schedules for several stages per rank."""
_NUM_BUFFERS = 2
_MAX_LOOPS = 8
"""Stages per rank: more shorten the bubble little and hold more micro-batches."""
Mesh = tuple[int, int, int]
"""Replicas, pipeline ranks and micro-batch size of candidates whose links are busy alike."""
Kind = tuple[Schedule, int, int, int, int]
"""Of candidates whose memory is estimated alike: schedule, mesh, micro-batch size, partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A choice under a schedule, and what is known of it so far."""

    choice: Choice
    schedule: Schedule
    group_size: int
    model: OrderModel | None = None
    split: Split | None = None
    """A simple one, once the order has been looked at."""
    is_improved: bool = False
    """Then it fits, by the model."""

    @property
    def mesh(self) -> Mesh:
        """What candidates of alike links have in common."""
        choice = self.choice
        return choice.num_replicas, choice.num_pipeline_ranks, choice.micro_batch_size

    @property
    def kind(self) -> Kind:
        """What candidates of alike memory have in common."""
        return self.schedule, *self.mesh, self.choice.partition

    @property
    def unpartitioned(self) -> "Candidate":
        """What it is but for its partition, of which one does nearly as well as another."""
        choice = replace(self.choice, partition=0, partition_group_size=0)
        return Candidate(choice=choice, schedule=self.schedule, group_size=self.group_size)


def candidates_of(
    choices: Sequence[Choice], schedules: Sequence[Schedule], problem: Problem
) -> Iterator[Candidate]:
    """Every choice under every schedule that it goes with, in an order of their own."""
    wanted = problem.constraints
    plain = {
        replace(
            choice, recompute=wanted.recompute, offload_state=False, offload_inputs=False,
            num_buffers=wanted.num_buffers or _NUM_BUFFERS, partition=level,
            partition_group_size=size,
        )
        for choice in choices
        for level, size in _levels(choice, problem)
    }  # fmt: skip
    for choice in sorted(plain, key=str):
        for schedule in schedules:
            for group_size in _group_sizes(schedule, choice):
                yield Candidate(choice=choice, schedule=schedule, group_size=group_size)


def _levels(choice: Choice, problem: Problem) -> Iterator[tuple[int, int]]:
    """Of partition, with the size of its groups; state whose weights stay whole is gathered once,
    whatever the order."""
    yield choice.partition, choice.partition_group_size
    sizes = partition_group_sizes(problem, choice.grid)
    if problem.constraints.partition is None and sizes:
        yield 2, sizes[0]


def _group_sizes(schedule: Schedule, choice: Choice) -> tuple[int, ...]:
    """Of the hybrid schedule, 0 for others; none where the schedule does not go with the choice."""
    ranks, loops, count = (
        choice.num_pipeline_ranks, choice.stages_per_rank, choice.num_micro_batches
    )  # fmt: skip
    if schedule is Schedule.PLAIN:
        return (0,) if ranks == 1 else ()
    if ranks == 1:
        return ()
    if schedule not in _LOOPED:
        return (0,) if loops == 1 else ()
    if not 1 < loops <= _MAX_LOOPS:
        return ()
    if schedule is Schedule.INTERLEAVED:
        return () if count % ranks else (0,)
    return hybrid_group_sizes(ranks, count)


def hybrid_group_sizes(ranks: int, count: int) -> tuple[int, ...]:
    """Micro-batches that pass through a stage together, which the hybrid schedule is tried with."""
    sizes = dict.fromkeys((2 * ranks, -(-count // 2), count))
    return tuple(size for size in sizes if ranks < size <= count and not 0 < count % size < ranks)
