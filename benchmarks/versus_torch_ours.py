"""Our side: for each of torch's ways the plan of the same order, or the solver's in as much memory.

The same order means as many replicas, pipeline ranks, stages and micro-batches, the same layers in
each stage, the same order of compute and the same share of the state on each replica; but that
against DDP the optimizer's state is divided, which moves as many bytes. What takes more memory
there are the sums of gradients, which lie in one place from a stage's first backward on: orders
that keep all micro-batches until then have no room for them. This module knows plans. It does not
time anything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor
from versus_torch_memory import Memory
from versus_torch_model import Sizes, model_file
from versus_torch_theirs import CPU, Batch, DataParallel, Observe, Part, Pipelined, Sharding

from planner.check import check
from planner.cluster import Cluster
from planner.pipeline import find_plan
from planner.plan.types import Plan
from planner.prepare import Prepared, prepare
from planner.schedules import Schedule
from planner.solve import Constraints, Placement
from runtime.build import make_executor
from runtime.exchange import Channel
from runtime.shards import UnitState
from runtime.transfer import DistributedTransport
from runtime.transport import Pending

__all__ = ["Contest", "OurContender", "contests", "plan_within", "prepared_for"]

SCHEDULES = {
    "GPipe": Schedule.GPIPE,
    "1F1B": Schedule.ONE_F_ONE_B,
    "Interleaved1F1B": Schedule.INTERLEAVED,
    "LoopedBFS": Schedule.LAYERED,
}
DATA_PARALLEL_STAGES = {None: 1, Sharding.KEEP: 2, Sharding.RESHARD: 4}
"""Units of gathers, reductions and updates where one rank has the whole model. DDP sums gradients
of 25 MiB at a time: here of nearly the whole model."""
PARTITIONS = {None: 1, Sharding.KEEP: 2, Sharding.RESHARD: 3}
"""A sum on all replicas, which DDP takes, is a sum of parts and a gather of them: with the update
in between, each replica updates its part alone."""
MEASURED_OVER_PLANNED = 1.01
"""A run may take so much more memory than its plan says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """One of torch's ways, and ours of the same mesh."""

    name: str
    theirs: Pipelined | DataParallel
    boundaries: tuple[int, ...]
    placement: Placement


def contests(sizes: Sizes, num_ranks: int) -> Iterator[Contest]:
    """All of them on so many ranks."""
    for num_replicas in (1, 2):
        for schedule in SCHEDULES:
            stages_per_rank = 1 if schedule in ("GPipe", "1F1B") else 2
            kind = Pipelined(
                schedule=schedule, stages_per_rank=stages_per_rank, num_replicas=num_replicas
            )
            name = schedule + (" + FSDP2" if num_replicas > 1 else "")
            if num_ranks // num_replicas > 1:
                yield _contest(sizes, num_ranks, name, kind)
    for name, sharding in (
        ("FSDP2, reshard", Sharding.RESHARD),
        ("FSDP2, no reshard", Sharding.KEEP),
        ("DDP, no_sync", None),
    ):
        yield _contest(sizes, num_ranks, name, DataParallel(sharding=sharding))


def _contest(sizes: Sizes, num_ranks: int, name: str, kind: Pipelined | DataParallel) -> Contest:
    if isinstance(kind, Pipelined):
        num_replicas, schedule = kind.num_replicas, SCHEDULES[kind.schedule]
        partition = PARTITIONS[Sharding.KEEP] if num_replicas > 1 else 0
        num_stages = num_ranks // num_replicas * kind.stages_per_rank
        boundaries = _even_boundaries(sizes, num_stages)
    else:
        num_replicas, schedule, partition = num_ranks, Schedule.PLAIN, PARTITIONS[kind.sharding]
        boundaries = _even_boundaries(sizes, DATA_PARALLEL_STAGES[kind.sharding])
    num_pipeline_ranks = num_ranks // num_replicas
    num_stages = len(boundaries) - 1
    placement = Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_pipeline_ranks,
        boundaries=boundaries,
        stage_ranks=tuple(s % num_pipeline_ranks for s in range(num_stages)),
        micro_batch_size=sizes.micro_batch_size,
        num_micro_batches=sizes.global_batch_size // num_replicas // sizes.micro_batch_size,
        partition=partition,
        recompute=(False,) * num_stages,
        schedule=schedule,
    )
    return Contest(name=name, theirs=kind, boundaries=boundaries, placement=placement)


def _even_boundaries(sizes: Sizes, num_stages: int) -> tuple[int, ...]:
    """As many blocks in each stage; the embedding with the first, the head with the last."""
    cuts = [1 + round(s * sizes.num_blocks / num_stages) for s in range(1, num_stages)]
    return (0, *cuts, sizes.num_layers)


def prepared_for(sizes: Sizes, cluster: Cluster, num_ranks: int) -> Prepared:
    """The model, traced and profiled, and the question of its best plan."""
    return prepare(
        model_file(sizes),
        num_devices=num_ranks,
        cluster=cluster,
        global_batch_size=sizes.global_batch_size,
        time_limit_seconds=5,
    )


def plan_within(prepared: Prepared, placement: Placement, peak_bytes: int) -> Plan:
    """The proved plan of a placement, or the solver's for its mesh, within so much memory."""
    limit_bytes = int(peak_bytes / MEASURED_OVER_PLANNED)
    plan, simulation = prepared.lowered(placement)
    if max(simulation.peak_bytes) > limit_bytes:
        plan = _planned_within(prepared, placement, limit_bytes)
    report = check(plan)
    assert report.passed, report
    return plan


def _planned_within(prepared: Prepared, placement: Placement, limit_bytes: int) -> Plan:
    """Which layers each stage has, how many stages, and what is recomputed are left to the solver.

    1F1B idles as GPipe does, and keeps less. Offload would win nothing where a CPU is the device.
    """
    is_gpipe = placement.schedule is Schedule.GPIPE
    problem = replace(
        prepared.problem,
        memory_limit_bytes=limit_bytes,
        constraints=Constraints(
            num_replicas=placement.num_replicas,
            num_pipeline_ranks=placement.num_pipeline_ranks,
            micro_batch_size=placement.micro_batch_size,
            partition=placement.partition,
            offload_state=False,
            offload_inputs=False,
            schedule=Schedule.ONE_F_ONE_B if is_gpipe else Schedule.LAYERED,
        ),
    )
    return find_plan(replace(prepared, problem=problem)).plan


class OurContender:
    """An executor of a plan on this rank."""

    def __init__(self, sizes: Sizes, plan: Plan, memory: Memory) -> None:
        """`memory` follows what the transport's threads make as well."""
        self.is_idle = dist.get_rank() >= plan.world_size
        self._transport = _Transport(plan, dist.get_rank(), memory)
        if self.is_idle:
            return
        self._executor = make_executor(
            plan, model_file(sizes), self._transport, dist.get_rank(), CPU
        )
        samples = plan.replica_batch_size
        first = self._executor.replica * samples
        self._mine = slice(first, first + samples)

    def step(self, batch: Batch, observe: Observe | None = None) -> None:
        if self.is_idle:
            return
        mine = {key: value[self._mine] for key, value in batch.items()}
        if observe is None:
            self._executor.step(mine)
            return
        found: list[Part] = []
        self._executor.observe(lambda state, gradient: found.extend(_parts(state, gradient)))
        self._executor.step(mine)
        self._executor.observe(None)
        observe(iter(found))


def _parts(state: UnitState, gradient: Tensor) -> Iterator[Part]:
    for piece in state.pieces:
        mine = gradient[piece.first - state.first : piece.last - state.first]
        yield piece.name, piece.first - state.ranges[piece.name][0], mine.clone()


class _Transport(DistributedTransport):
    """Its threads are watched where the step is."""

    def __init__(self, plan: Plan, world_rank: int, memory: Memory) -> None:
        super().__init__(plan, world_rank, CPU)
        self._memory = memory

    def _run(self, channel: Channel, job: Callable[[], None]) -> Pending:
        def watched() -> None:
            with self._memory.watching_here():
                job()

        return super()._run(channel, watched)
