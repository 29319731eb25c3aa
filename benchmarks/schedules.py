"""Every schedule family on equal terms: `python benchmarks/schedules.py`.

One chain of equal layers (forward 1 s, backward 2 s) is lowered under each family, checked, and
simulated twice: with free transfers, for the bubble, and with two replicas that partition the state
over a slow link, for what gathers and reductions cost. All numbers are exact in the model.
"""

from collections import Counter

import click
from rich.console import Console
from rich.table import Table

from planner.check import check
from planner.cluster.types import Cluster, Host, Link
from planner.export.skeleton import StageCosts, chain_model, ideal_cluster
from planner.lower import lower
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve.types import Placement

FAMILIES = (
    (Schedule.PLAIN, 1), (Schedule.GPIPE, 1), (Schedule.ONE_F_ONE_B, 1), (Schedule.ZERO_BUBBLE, 1),
    (Schedule.INTERLEAVED, 2), (Schedule.INTERLEAVED, 4), (Schedule.HYBRID, 4),
    (Schedule.LAYERED, 1), (Schedule.LAYERED, 2), (Schedule.LAYERED, 4),
)  # fmt: skip
"""Family and stages per rank."""
_NUM_PARAMETERS = 10**9
"""Of a layer."""


@click.command()
@click.option("--layers", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--micro-batches", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--reduction",
    type=click.FloatRange(min=0.0, min_open=True),
    default=2.0,
    show_default=True,
    help="Seconds that the reduction of one layer takes when nothing else uses the link.",
)
def main(layers: int, ranks: int, micro_batches: int, reduction: float) -> None:
    """Print a row per schedule family and number of stages per rank."""
    table = Table(
        title=f"{layers} layers, {ranks} ranks, {micro_batches} micro-batches; right: 2 replicas, "
        f"state partitioned, {reduction:g} s to gather or reduce a layer"
    )
    columns = (
        "schedule", "stages per rank", "step", "overhead", "tensors held",
        "gathers", "reductions", "step, partitioned",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "schedule" else "right")
    ideal_seconds = 3 * layers / ranks * micro_batches
    for schedule, per_rank in FAMILIES:
        if layers % (ranks * per_rank):
            continue
        plan = _plan(schedule, per_rank, layers, ranks, micro_batches, 1, reduction)
        simulation = simulate(plan)
        partitioned = _plan(schedule, per_rank, layers, ranks, micro_batches, 2, reduction)
        counts = Counter(i.opcode for i in partitioned.programs[0])
        layer_inputs = max(memory.stored_inputs for memory in simulation.memory) / 4
        table.add_row(
            schedule.value,
            str(per_rank),
            f"{simulation.step_seconds:.1f} s",
            f"{simulation.step_seconds / ideal_seconds - 1:.4f}",
            f"{layer_inputs:.0f}",
            str(counts[Opcode.GATHER]),
            str(counts[Opcode.REDUCE]),
            f"{simulate(partitioned).step_seconds:.1f} s",
        )
    Console().print(table)


def _plan(
    schedule: Schedule,
    per_rank: int,
    num_layers: int,
    num_ranks: int,
    num_micro_batches: int,
    num_replicas: int,
    reduction_seconds: float,
) -> Plan:
    graph, profile = chain_model(num_layers, StageCosts(num_parameters=_NUM_PARAMETERS))
    num_stages = num_ranks * per_rank
    placement = Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_ranks,
        boundaries=tuple(range(0, num_layers + 1, num_layers // num_stages)),
        stage_ranks=tuple(stage % num_ranks for stage in range(num_stages)),
        micro_batch_size=1,
        num_micro_batches=num_micro_batches,
        partition=3 if num_replicas > 1 else 0,
        recompute=(False,) * num_stages,
        schedule=schedule,
        group_size=min(num_micro_batches, 2 * num_ranks),
    )
    cluster = ideal_cluster(placement.world_size)
    if num_replicas > 1:
        cluster = _slow_between_replicas(cluster, reduction_seconds)
    plan = lower(graph, profile, cluster, placement, PlanOptions())
    report = check(plan)
    if not report.passed:
        raise click.ClickException(report.failures[0].counterexample)
    return plan


def _slow_between_replicas(cluster: Cluster, reduction_seconds: float) -> Cluster:
    """A link over which half a layer passes in so many seconds, and a boundary tensor in none."""
    part_bytes = 4 * _NUM_PARAMETERS / 2
    link = Link(name="slow", bandwidth=part_bytes / reduction_seconds, latency_seconds=0.0)
    (host,) = cluster.hosts
    hosts = (Host(device=host.device, num_devices=host.num_devices, link=link),)
    return Cluster(
        name="slow between replicas",
        hosts=hosts,
        network=link,
        backend=cluster.backend,
        provenance=cluster.provenance,
    )


if __name__ == "__main__":
    main()
