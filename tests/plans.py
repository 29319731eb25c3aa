"""Plans made by hand, for tests that need a Plan but no model."""

from collections.abc import Iterable

from planner.cluster.types import Cluster, Device, Host, Link
from planner.layouts import Layout
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions, Unit
from planner.schedules import Schedule

__all__ = ["minimal_plan"]


def minimal_plan(
    num_pipeline_ranks: int = 1,
    num_replicas: int = 1,
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
    tied: Iterable[tuple[int, ...]] = (),
    layout: Layout = Layout.REPLICAS_INSIDE,
    partition: int = 0,
    partition_group_size: int = 0,
    deadline_seconds: float = 30.0,
    heartbeat_seconds: float = 3.0,
) -> Plan:
    """A plan of no stages: one call of all ranks, and a transfer for each (source, destination).

    `pairs` defaults to both directions of the ring's neighbours; `tied` are rank sets that share
    a unit of one parameter.
    """
    if pairs is None:
        ring = [(rank, (rank + 1) % num_pipeline_ranks) for rank in range(num_pipeline_ranks)]
        pairs = [pair for a, b in ring if a != b for pair in ((a, b), (b, a))]
    world = Instruction(opcode=Opcode.CHECK_FINITE, stream="data", writes=("finite",))
    programs: list[list[Instruction]] = [[world] for _ in range(num_pipeline_ranks)]
    for source, destination in dict.fromkeys(pairs):
        programs[source].append(
            Instruction(opcode=Opcode.SEND, stream=f"to.{destination}", peer=destination)
        )
        programs[destination].append(
            Instruction(opcode=Opcode.RECEIVE, stream=f"from.{source}", peer=source)
        )
    units = tuple(
        Unit(
            name=f"tied{index}",
            dtype="float32",
            parameters=(f"p{index}",),
            num_elements=1,
            stages=ranks,
            ranks=ranks,
        )
        for index, ranks in enumerate(tied)
    )
    return Plan(
        model_name="by hand",
        fingerprint="none",
        cluster=_cluster(num_pipeline_ranks * num_replicas),
        num_replicas=num_replicas,
        num_pipeline_ranks=num_pipeline_ranks,
        micro_batch_size=1,
        num_micro_batches=1,
        partition=partition,
        offload_state=False,
        schedule=Schedule.LAYERED,
        layer_names=(),
        batch=(),
        tensors=(),
        parameters=(),
        units=units,
        stages=(),
        num_random_operators=0,
        options=PlanOptions(deadline_seconds=deadline_seconds, heartbeat_seconds=heartbeat_seconds),
        prediction=None,
        programs=tuple(tuple(program) for program in programs),
        evaluation=(),
        buffers=((),) * num_pipeline_ranks,
        layout=layout,
        partition_group_size=partition_group_size,
    )


def _cluster(num_devices: int) -> Cluster:
    """One host of round numbers."""
    device = Device(
        name="round",
        memory_bytes=10**9,
        peak_flops={"float32": 1e11},
        memory_bandwidth=1e10,
        kernel_overhead_seconds=1e-6,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="by hand",
    )
    link = Link(name="round", bandwidth=1e9, latency_seconds=1e-5)
    host = Host(device=device, num_devices=num_devices, link=link)
    return Cluster(
        name="by hand", hosts=(host,), network=link, backend="gloo", provenance="by hand"
    )
