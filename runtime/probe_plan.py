"""Plans of no layers: arrangements of ranks between which transfers and collectives are measured.

Such a plan opens the same process groups in the same way as a plan that trains. Knows ranks and
pairs; does not know what is sent between them.
"""

from collections.abc import Iterable, Sequence

from planner.cluster.types import Cluster, Device, Host, Link
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions
from planner.schedules import Schedule

__all__ = ["probe_plan"]


def probe_plan(
    num_pipeline_ranks: int,
    num_replicas: int,
    backend: str,
    deadline_seconds: float,
    pairs: Iterable[tuple[int, int]] = (),
) -> Plan:
    """A plan with a stream in both directions between each pair of pipeline ranks."""
    programs: list[list[Instruction]] = [[] for _ in range(num_pipeline_ranks)]
    both_ways = (way for a, b in pairs for way in ((a, b), (b, a)))
    for source, destination in dict.fromkeys(both_ways):
        programs[source].append(
            Instruction(opcode=Opcode.SEND, stream=f"to.{destination}", peer=destination)
        )
        programs[destination].append(
            Instruction(opcode=Opcode.RECEIVE, stream=f"from.{source}", peer=source)
        )
    return _plan(programs, num_replicas, backend, PlanOptions(deadline_seconds=deadline_seconds))


def _plan(
    programs: Sequence[Sequence[Instruction]], num_replicas: int, backend: str, options: PlanOptions
) -> Plan:
    return Plan(
        model_name="none: links are measured",
        fingerprint="",
        cluster=_unknown_cluster(len(programs) * num_replicas, backend),
        num_replicas=num_replicas,
        num_pipeline_ranks=len(programs),
        micro_batch_size=1,
        num_micro_batches=1,
        partition=0,
        offload_state=False,
        schedule=Schedule.CUSTOM,
        layer_names=(),
        batch=(),
        tensors=(),
        parameters=(),
        units=(),
        stages=(),
        num_random_operators=0,
        options=options,
        prediction=None,
        programs=tuple(map(tuple, programs)),
        evaluation=(),
        buffers=((),) * len(programs),
    )


def _unknown_cluster(num_devices: int, backend: str) -> Cluster:
    """Of the cluster, a transport reads the backend only."""
    device = Device(
        name="to be measured",
        memory_bytes=1,
        peak_flops={"float32": 1.0},
        memory_bandwidth=1.0,
        kernel_overhead_seconds=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="to be measured",
    )
    link = Link(name="to be measured", bandwidth=1.0, latency_seconds=0.0)
    return Cluster(
        name="to be measured",
        hosts=(Host(device=device, num_devices=num_devices, link=link),),
        network=link,
        backend=backend,
        provenance="to be measured",
    )
