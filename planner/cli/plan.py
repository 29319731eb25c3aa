"""`lga-plan MODEL --gpus N`: make a plan, say what it costs and why, write it."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from planner.batch import (
    Tried,
    best_batch,
    critical_batch_samples,
    critical_batch_size,
    sizes_in,
    tokens_per_sample,
)
from planner.cli.explain import Questions, answer, explain_options, larger_clusters
from planner.cli.plan_options import plan_options
from planner.cli.plan_request import PlanRequest
from planner.cli.search_bar import search_bar
from planner.cluster.resolve import resolve_cluster
from planner.console import HELP, check_can_write, command_errors, console
from planner.errors import UsageError
from planner.explain.changes import ClusterAt
from planner.heap import collect_rarely
from planner.measure.file import read_profile
from planner.model_file import load_model_file
from planner.pipeline import PlanResult, find_plan
from planner.plan.file import write_plan
from planner.precision import Precision
from planner.prepare import Prepared, default_batch_size, prepare
from planner.report import (
    candidate_table,
    memory_table,
    placement_table,
    plan_lines,
    seconds_text,
    solution_lines,
)
from planner.report.order import order_line, order_table
from planner.report.training import batch_table, training_lines

__all__ = ["main"]


@click.command(context_settings=HELP)
@plan_options
@explain_options
@command_errors()
def main(questions: Questions, **words: Any) -> None:
    """Plan one training step of MODEL on a number of devices.

    MODEL is a Python file or module, or the config.json of a causal language model of the
    transformers library.

    Whatever of mesh, micro-batches, partition, recomputation, offload and buffers is not given is
    chosen, so that the predicted step is shortest. Nothing is written unless a plan is found and
    proved.
    """
    collect_rarely()
    request = PlanRequest(**words)
    request.refuse_contradictions()
    if request.order is not None and (questions.explain or questions.what_if is not None):
        raise UsageError(
            f"--explain and --what-if compare schedules of families, not --schedule "
            f"{request.order.value}",
            hint="--schedule any, or leave the question out",
        )
    model_file = load_model_file(request.model, sequence_length=request.sequence_length)
    path = request.output or Path(f"{model_file.name}.plan.yaml")
    inputs = [model_file.path, request.cluster or "", request.profile or ""]
    check_can_write(path, "--output", inputs)
    questions.check([*inputs, path])
    cluster = resolve_cluster(request.cluster, request.gpus)
    request.refuse_on(cluster)
    prepared = prepare(
        model_file,
        num_devices=request.gpus,
        cluster=cluster,
        constraints=request.constraints,
        measured=None if request.profile is None else read_profile(request.profile),
        memory_limit_bytes=request.memory_limit_bytes,
        clip_norm=request.clip_norm,
        clip_delayed=request.clip_delayed,
        check_finite=request.check_finite,
        update_on_host=request.update_on_host,
        precision=Precision(request.precision),
        keep_float32=request.keep_float32,
        time_limit_seconds=request.time_limit,
        seed=request.seed,
    ).with_order(request.order)
    questions.check_model(prepared.graph)
    larger = larger_clusters(prepared.problem.cluster, partial(resolve_cluster, request.cluster))
    result, tried = _planned(prepared, request, larger)
    write_plan(result.plan, path)
    _print_result(result, request.gpus)
    if len(tried) > 1:
        console.print(batch_table(request.training, tried))
    for line in training_lines(request.training, result):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"plan      written to {path}"), soft_wrap=True)
    answer(questions, result, larger)


def _planned(
    prepared: Prepared, request: PlanRequest, larger: ClusterAt
) -> tuple[PlanResult, tuple[Tried, ...]]:
    """The plan of the batch asked for, or of the best in a range, and all that were tried."""
    graph, batch = prepared.graph, request.global_batch
    request.training.steps_with(1, tokens_per_sample(graph))  # refused now, not after the search
    devices, constraints = request.gpus, request.constraints
    if batch is not None and batch.least < batch.most:
        sizes = sizes_in(batch, devices, constraints)
        console.print(f"batches   {', '.join(map(str, sizes))} samples", highlight=False)
        with search_bar() as listener:
            return best_batch(
                prepared, sizes, lambda size: listener(f"{size} samples"), cluster_at=larger
            )
    if batch is not None:
        size = batch.least
    elif request.critical_batch:
        size = critical_batch_size(graph, devices, constraints)
        law = critical_batch_samples(graph)
        words = f"critical batch: {size} samples per step, of {law:.0f} by the law"
        console.print(words, highlight=False)
    else:
        size = default_batch_size(devices, constraints)
        console.print(f"no --global-batch given: {size} samples per step", highlight=False)
    with search_bar() as listener:
        return find_plan(prepared.with_batch(size), listener("searching"), cluster_at=larger), ()


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
    if result.order is not None:
        console.print(Text(order_line(result.order)), soft_wrap=True)
        console.print(order_table(result.order))
    num_rules = len(result.report.verdicts)
    console.print(Text(f"checked   {num_rules} of {num_rules} rules hold"), soft_wrap=True)
