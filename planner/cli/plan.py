"""`lga-plan MODEL --gpus N`: make a plan, say what it costs and why, write it."""

from pathlib import Path

import click
from rich.text import Text

from planner.cluster.resolve import DEFAULT_CLUSTER, resolve_cluster
from planner.console import (
    DEVICES,
    HELP,
    NORM,
    SAMPLES,
    SECONDS,
    SEED,
    check_can_write,
    command_errors,
    console,
)
from planner.measure.file import read_profile
from planner.model_file import DEFAULT_SEQUENCE_LENGTH, load_model_file
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


@click.command(context_settings=HELP)
@click.argument("model")
@click.option("--gpus", type=DEVICES, required=True, help="Devices to plan for.")
@click.option(
    "--cluster",
    help="A device in its usual hosts (a100-80, h100-sxm, ...), `cpu` for processes of this "
    "machine, or a cluster file ending in .yaml  [default: this machine's GPUs, else "
    f"{DEFAULT_CLUSTER}]",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="File of lga-profile: layers take what was measured on this kind of device.",
)
@click.option(
    "--batch-size",
    type=SAMPLES,
    help="Samples per step, over all devices  [default: what the other options imply, else "
    f"{DEFAULT_SAMPLES_PER_DEVICE} per device]",
)
@click.option(
    "--sequence-length",
    type=SAMPLES,
    help="Tokens per sample, where MODEL is a config.json  "
    f"[default: {DEFAULT_SEQUENCE_LENGTH}, or the model's positions if it has fewer]",
)
@click.option("--micro-batch-size", type=SAMPLES, help="Samples per micro-batch.")
@click.option("--micro-batches", type=SAMPLES, help="Micro-batches per replica and step.")
@click.option("--replicas", type=DEVICES, help="Data-parallel replicas of the pipeline.")
@click.option("--pipeline-ranks", type=DEVICES, help="Devices in the pipeline of one replica.")
@click.option(
    "--stages-per-rank", type=SAMPLES, help="Times that the pipeline goes round all its devices."
)
@click.option(
    "--partition",
    type=click.Choice(["0", "3"]),
    help="0: every replica holds weights, gradients and optimizer state whole. 3: each holds a "
    "part of them.",
)
@click.option(
    "--recompute/--no-recompute",
    default=None,
    help="Keep only the inputs of stages and run forward again before backward, or keep all "
    "activations.",
)
@click.option(
    "--clip-norm",
    type=NORM,
    help="Scale the gradient down to this norm over the whole model. All updates then stand at the "
    "end of the step.",
)
@click.option(
    "--check-finite",
    is_flag=True,
    help="Update nothing in a step with a gradient that is not finite. All updates then stand at "
    "the end of the step.",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Memory to use per device, such as 40GB or 512MiB  [default: the device's memory, less "
    "what is reserved]",
)
@click.option(
    "--time-limit",
    type=SECONDS,
    default=20.0,
    show_default=True,
    help="Longest that the solver may search.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Of the solver, and of the run: weights, order of samples, dropout.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write the plan to  [default: MODEL's name with .plan.yaml, in this folder]",
)
@command_errors()
def main(
    model: str,
    gpus: int,
    cluster: str | None,
    profile: Path | None,
    batch_size: int | None,
    sequence_length: int | None,
    micro_batch_size: int | None,
    micro_batches: int | None,
    replicas: int | None,
    pipeline_ranks: int | None,
    stages_per_rank: int | None,
    partition: str | None,
    recompute: bool | None,
    clip_norm: float | None,
    check_finite: bool,
    memory_limit: str | None,
    time_limit: float,
    seed: int,
    output: Path | None,
) -> None:
    """Plan one training step of MODEL on a number of devices.

    MODEL is a Python file or module, or the config.json of a causal language model of the
    transformers library.

    Whatever of mesh, micro-batches, partition and recomputation is not given is chosen, so that
    the predicted step is shortest. Nothing is written unless a plan is found and proved.
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
    batch_size = batch_size or _default_batch_size(gpus, constraints)
    model_file = load_model_file(model, sequence_length=sequence_length)
    path = output if output is not None else Path(f"{model_file.name}.plan.yaml")
    check_can_write(path, "--output", [model_file.path, cluster or "", profile or ""])
    result = make_plan(
        model_file,
        num_devices=gpus,
        cluster=resolve_cluster(cluster, gpus),
        global_batch_size=batch_size,
        constraints=constraints,
        measured=None if profile is None else read_profile(profile),
        memory_limit_bytes=limit,
        clip_norm=clip_norm,
        check_finite=check_finite,
        time_limit_seconds=time_limit,
        seed=seed,
    )
    write_plan(result.plan, path)
    _print_result(result, gpus)
    console.print(Text(f"plan      written to {path}"), soft_wrap=True)


def _default_batch_size(gpus: int, constraints: Constraints) -> int:
    found = default_batch_size(gpus, constraints)
    console.print(f"no --batch-size given: {found} samples per step", highlight=False)
    return found


def _print_result(result: PlanResult, gpus: int) -> None:
    plan, simulation = result.plan, result.simulation
    lines = plan_lines(plan)
    if plan.world_size < gpus:
        lines.append(f"devices   {plan.world_size} of {gpus}: more would not fit or not help")
    if result.measured is not None:
        lines.append(f"layers    {result.measured.note_at(plan.micro_batch_size)}")
        if result.measured.warning:
            lines.append(f"warning   {result.measured.warning}")
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
