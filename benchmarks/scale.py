"""How planning's last steps grow with the plan: `python benchmarks/scale.py`.

Lowers, checks and simulates layered plans of chains of equal stages, up to a million instructions,
and the plan of the demo's shape. Each step should take the same time per instruction at every size.
"""

import itertools
import resource
import time

import click
from rich.console import Console
from rich.table import Table

from planner.check import check
from planner.export.skeleton import StageCosts, chain_model, ideal_cluster
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.simulate import simulate
from planner.solve.types import Placement

SIZES = (
    ("the demo's pipeline", 4, 4, 4, 2),
    ("X_160", 160, 5, 5, 1),
    ("64 stages", 64, 16, 32, 1),
    ("256 stages", 256, 32, 64, 1),
    ("512 stages", 512, 64, 64, 1),
    ("1024 stages", 1024, 64, 128, 1),
)
"""Name, stages, pipeline ranks, micro-batches, replicas."""


@click.command()
@click.option("--largest", type=int, default=1024, show_default=True, help="Most stages to plan.")
def main(largest: int) -> None:
    """Print seconds of each step, in all and per instruction."""
    table = Table(title="seconds, and microseconds per instruction")
    columns = ("plan", "instructions", "lower", "check", "simulate", "together", "µs", "memory")
    for column in columns:
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, num_stages, num_ranks, num_micro_batches, num_replicas in SIZES:
        if num_stages <= largest:
            table.add_row(name, *_measure(num_stages, num_ranks, num_micro_batches, num_replicas))
    Console().print(table)


def _measure(
    num_stages: int, num_ranks: int, num_micro_batches: int, num_replicas: int
) -> list[str]:
    graph, profile = chain_model(num_stages, StageCosts(tensor_bytes=1 << 20))
    placement = Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_ranks,
        boundaries=tuple(range(num_stages + 1)),
        stage_ranks=tuple(stage % num_ranks for stage in range(num_stages)),
        micro_batch_size=1,
        num_micro_batches=num_micro_batches,
        partition=3 if num_replicas > 1 else 0,
        recompute=(False,) * num_stages,
    )
    cluster = ideal_cluster(placement.world_size)
    times = [time.perf_counter()]
    plan = lower(graph, profile, cluster, placement, PlanOptions())
    times.append(time.perf_counter())
    report = check(plan)
    times.append(time.perf_counter())
    simulation = simulate(plan)
    times.append(time.perf_counter())
    if not report.passed or simulation.step_seconds <= 0:
        raise click.ClickException(f"the plan of {num_stages} stages is wrong")
    num_instructions = sum(map(len, plan.programs))
    spent = [after - before for before, after in itertools.pairwise(times)]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        f"{num_instructions:,}",
        *(f"{seconds:.2f}" for seconds in (*spent, sum(spent))),
        f"{sum(spent) / num_instructions * 1e6:.0f}",
        f"{peak_kib / 2**20:.1f} GiB",
    ]


if __name__ == "__main__":
    main()
