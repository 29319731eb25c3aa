"""`lga-plan MODEL --gpus N`: make a plan, say what it costs and why, write it."""

from pathlib import Path

import click
from rich.text import Text

from planner.cluster import resolve_cluster
from planner.console import command_errors, console
from planner.model_file import load_model_file
from planner.pipeline import DEFAULT_SAMPLES_PER_DEVICE, PlanResult, default_batch_size, make_plan
from planner.plan.file import write_plan
from planner.report import (
    candidate_table,
    memory_table,
    parse_bytes,
    placement_table,
    plan_lines,
    seconds_text,
    solution_lines,
)
from planner.solve import Constraints

__all__ = ["main"]

_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--gpus", type=_POSITIVE, required=True, help="Devices to plan for.")
@click.option("--cluster", help="Name of a device (a100-80, ...), `cpu`, or a cluster YAML file.")
@click.option(
    "--batch-size",
    type=_POSITIVE,
    help=f"Samples per step over all devices [default: {DEFAULT_SAMPLES_PER_DEVICE} per device].",
)
@click.option("--micro-batch-size", type=_POSITIVE, help="Samples per micro-batch.")
@click.option("--micro-batches", type=_POSITIVE, help="Micro-batches per replica and step.")
@click.option("--replicas", type=_POSITIVE, help="Data-parallel replicas.")
@click.option("--pipeline-ranks", type=_POSITIVE, help="Devices of one replica's pipeline.")
@click.option("--stages-per-rank", type=_POSITIVE, help="Loops of the pipeline ring.")
@click.option(
    "--partition",
    type=click.Choice(["0", "3"]),
    help="0: every replica holds the whole state; 3: weights, gradients, optimizer are sharded.",
)
@click.option("--recompute/--no-recompute", default=None, help="Keep only stage inputs.")
@click.option("--memory-limit", help="Per device, such as 40GB [default: the device's memory].")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds for the solver.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Plan file.")
@command_errors()
def main(
    model: str,
    gpus: int,
    cluster: str | None,
    batch_size: int | None,
    micro_batch_size: int | None,
    micro_batches: int | None,
    replicas: int | None,
    pipeline_ranks: int | None,
    stages_per_rank: int | None,
    partition: str | None,
    recompute: bool | None,
    memory_limit: str | None,
    time_limit: float,
    seed: int,
    output: Path | None,
) -> None:
    """Plan the training of MODEL (a Python file or module) on a number of devices.

    Options that are not given are chosen, so that the predicted step is shortest.
    """
    constraints = Constraints(
        num_replicas=replicas,
        num_pipeline_ranks=pipeline_ranks,
        stages_per_rank=stages_per_rank,
        micro_batch_size=micro_batch_size,
        num_micro_batches=micro_batches,
        partition=None if partition is None else int(partition),
        recompute=recompute,
    )
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if batch_size is None:
        batch_size = default_batch_size(gpus, constraints)
        console.print(f"no --batch-size given: {batch_size} samples per step", highlight=False)
    model_file = load_model_file(model)
    result = make_plan(
        model_file,
        num_devices=gpus,
        cluster=resolve_cluster(cluster, gpus),
        global_batch_size=batch_size,
        constraints=constraints,
        memory_limit_bytes=limit,
        time_limit_seconds=time_limit,
        seed=seed,
    )
    path = output or Path(f"{model_file.name}.plan.yaml")
    write_plan(result.plan, path)
    _print_result(result, gpus)
    console.print(Text(f"written   {path}"), soft_wrap=True)


def _print_result(result: PlanResult, gpus: int) -> None:
    plan, simulation = result.plan, result.simulation
    lines = plan_lines(plan)
    if plan.world_size < gpus:
        lines.append(f"devices   {plan.world_size} of {gpus}: more would not fit or not help")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print(placement_table(plan))
    console.print(
        Text(
            f"step      {seconds_text(simulation.step_seconds)}, bubble {simulation.bubble:.1%}, "
            f"{seconds_text(simulation.tail_seconds)} after the last backward"
        ),
        soft_wrap=True,
    )
    console.print(memory_table(plan, simulation))
    for line in solution_lines(result.solution):
        console.print(Text(line), soft_wrap=True)
    if any(candidate.verdict != "best" for candidate in result.solution.candidates):
        console.print(candidate_table(result.solution))
    num_rules = len(result.report.verdicts)
    console.print(Text(f"checked   {num_rules} of {num_rules} rules hold"), soft_wrap=True)
