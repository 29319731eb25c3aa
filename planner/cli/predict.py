"""`lga-predict MODEL --gpus N`: step time and memory of 3D configurations, without running them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from planner.cluster import Cluster
from planner.cluster.resolve import DEFAULT_CLUSTER, resolve_cluster
from planner.console import (
    DEVICES,
    HELP,
    SAMPLES,
    Count,
    check_can_write,
    command_errors,
    console,
)
from planner.errors import UsageError
from planner.files import write_text
from planner.graph import LayerGraph
from planner.measure import measure, with_splits
from planner.measure.optimizer_state import measure_optimizer
from planner.model_file import DEFAULT_SEQUENCE_LENGTH, load_model_file
from planner.precision import Precision
from planner.predict import Configuration, Predicted, configurations, predict, ranked
from planner.prepare import DEFAULT_SAMPLES_PER_DEVICE
from planner.profile import Profile
from planner.report import bytes_text, parse_bytes
from planner.report.predictions import (
    breakdown_table,
    comparison_table,
    configuration_lines,
    device_memory_table,
    predictions_csv,
)
from planner.schedules import Schedule
from planner.trace import trace

__all__ = ["main"]

_NOT_RUN = "the runtime does not execute tensor parallelism yet: this is a prediction alone"
_SCHEDULES = tuple(
    schedule.value
    for schedule in Schedule
    if schedule not in (Schedule.CUSTOM, Schedule.FORWARD, Schedule.HYBRID)
)
_MAX_ROWS = 40


class _Several(click.ParamType[Any]):
    """Values separated by commas."""

    def __init__(self, each: click.ParamType[Any]) -> None:
        self.each = each
        self.name = f"{each.name}[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        return tuple(
            dict.fromkeys(self.each.convert(part, param, ctx) for part in str(value).split(","))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A traced model, ready for every micro-batch size."""

    graph_at: Any
    profile_at: Any
    optimizer_slots: int


@click.command(context_settings=HELP)
@click.argument("model")
@click.option("--gpus", type=DEVICES, required=True, help="Devices: replicas x ranks x degree.")
@click.option(
    "--cluster",
    help="A device in its usual hosts (a100-80, h100-sxm, ...), or a cluster file ending in .yaml"
    f"  [default: this machine's GPUs, else {DEFAULT_CLUSTER}]",
)
@click.option("--tensor", type=_Several(DEVICES), help="Tensor degrees, inside a host.")
@click.option("--pipeline-ranks", type=_Several(DEVICES), help="Places in the pipeline.")
@click.option("--replicas", type=_Several(DEVICES), help="Data-parallel replicas.")
@click.option(
    "--stages-per-rank",
    type=_Several(Count(512)),
    help="Times that the pipeline goes round  [default: up to 4 where the schedule can]",
)
@click.option(
    "--schedule",
    type=_Several(click.Choice(_SCHEDULES)),
    default=Schedule.LAYERED.value,
    show_default=True,
    help=f"Orders of compute: {', '.join(_SCHEDULES)}.",
)
@click.option("--batch-size", type=SAMPLES, help="Samples per step, over all devices.")
@click.option(
    "--micro-batch-size",
    type=_Several(SAMPLES),
    default="1",
    show_default=True,
    help="Samples per micro-batch.",
)
@click.option("--micro-batches", type=_Several(SAMPLES), help="Micro-batches per replica and step.")
@click.option("--recompute/--no-recompute", default=None, help="Run forward again before backward.")
@click.option(
    "--partition",
    type=_Several(click.Choice(["0", "1", "2", "3"])),
    default="0",
    show_default=True,
    help="What replicas divide among them: 1 optimizer state, 2 and gradients, 3 and weights; 0 "
    "nothing.",
)
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.MODEL.value,
    show_default=True,
    help="model: as the model file builds it; others: mixed precision.",
)
@click.option(
    "--sequence-length",
    type=SAMPLES,
    help="Of a configuration file (.json) of a language model  "
    f"[default: the longest it allows, up to {DEFAULT_SEQUENCE_LENGTH}]",
)
@click.option("--memory-limit", metavar="SIZE", help="Memory per device, such as 40GB.")
@click.option(
    "--compare",
    is_flag=True,
    help="Whatever of tensor degree, pipeline ranks, replicas and recomputation is not given "
    "stands for all that can be.",
)
@click.option("--output", type=click.Path(path_type=Path), help="CSV file to write, in full.")
@command_errors()
def main(
    model: str,
    gpus: int,
    cluster: str | None,
    tensor: tuple[int, ...] | None,
    pipeline_ranks: tuple[int, ...] | None,
    replicas: tuple[int, ...] | None,
    stages_per_rank: tuple[int, ...] | None,
    schedule: tuple[str, ...],
    batch_size: int | None,
    micro_batch_size: tuple[int, ...],
    micro_batches: tuple[int, ...] | None,
    recompute: bool | None,
    partition: tuple[str, ...],
    precision: str,
    sequence_length: int | None,
    memory_limit: str | None,
    compare: bool,
    output: Path | None,
) -> None:
    """Predict a training step of MODEL under data, pipeline and tensor parallelism.

    One configuration is printed in full. Options take several values, separated by commas: all
    combinations that use all devices are then printed as a table, the fastest first.
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if output is not None:
        check_can_write(output, "--output", [model, cluster or ""])
    if batch_size is None and micro_batches is None:
        batch_size = DEFAULT_SAMPLES_PER_DEVICE * gpus
        console.print(f"no --batch-size given: {batch_size} samples per step", highlight=False)
    devices = resolve_cluster(cluster, gpus)
    several = None if compare else (1,)
    traced = _traced(model, Precision(precision), sequence_length)
    choices = list(
        configurations(
            gpus,
            devices_per_host=math.gcd(*(host.num_devices for host in devices.hosts)),
            num_layers=len(traced.graph_at(micro_batch_size[0]).layers),
            replicas=replicas,
            pipeline_ranks=pipeline_ranks or (several if replicas is None else None),
            tensor_degrees=tensor or several,
            stages_per_rank=stages_per_rank,
            micro_batch_sizes=micro_batch_size,
            num_micro_batches=micro_batches,
            global_batch_size=batch_size,
            schedules=tuple(map(Schedule, schedule)),
            recompute=(False, True) if compare and recompute is None else (bool(recompute),),
            partitions=tuple(map(int, partition)),
        )
    )
    if not choices:
        raise _no_combination(gpus, batch_size)
    predictions, refused = _predictions(traced, devices, choices, Precision(precision), limit)
    _print(predictions, devices)
    _print_notes(predictions, refused)
    if output is not None:
        write_text(output, predictions_csv(predictions))
        console.print(Text(f"table     written to {output}"), soft_wrap=True)


def _print_notes(predictions: Sequence[Predicted], refused: Mapping[str, int]) -> None:
    for reason, count in refused.items():
        words = "configuration" if count == 1 else "configurations"
        console.print(Text(f"left out  {count} {words}: {reason}"), soft_wrap=True)
    if any(found.configuration.tensor_degree > 1 for found in predictions):
        console.print(Text(f"note      {_NOT_RUN}"), soft_wrap=True)


def _no_combination(gpus: int, batch_size: int | None) -> UsageError:
    return UsageError(
        f"no combination of the given values uses all {gpus} devices"
        + (f" with a batch of {batch_size} samples" if batch_size else ""),
        hint="replicas x pipeline ranks x tensor degree must equal --gpus, the batch must be a "
        "multiple of replicas x micro-batch size, and there must be a layer for every stage",
    )


def _traced(model: str, precision: Precision, sequence_length: int | None) -> _Model:
    model_file = load_model_file(model, sequence_length=sequence_length)
    traced = trace(model_file, precision, model_file.keep_float32)

    @cache
    def profile_at(size: int) -> Profile:
        return with_splits(traced, measure(traced, size))

    @cache
    def graph_at(size: int) -> LayerGraph:
        return traced.layer_graph(size)

    slots = measure_optimizer(model_file, graph_at(1).parameters, precision).num_slots
    return _Model(graph_at=graph_at, profile_at=profile_at, optimizer_slots=slots)


def _predictions(
    model: _Model,
    cluster: Cluster,
    choices: Sequence[Configuration],
    precision: Precision,
    limit: int | None,
) -> tuple[list[Predicted], dict[str, int]]:
    """Predictions, best first; and why others are impossible, with their number."""
    predictions: list[Predicted] = []
    refused: dict[str, int] = {}
    last: UsageError | None = None
    for choice in choices:
        size = choice.micro_batch_size
        try:
            predictions.append(
                predict(
                    model.graph_at(size),
                    model.profile_at(size),
                    cluster,
                    choice,
                    optimizer_slots=model.optimizer_slots,
                    precision=precision,
                    memory_limit_bytes=limit,
                )
            )
        except UsageError as error:
            last = error
            refused[error.message] = refused.get(error.message, 0) + 1
    if last is not None and not predictions:
        raise last
    return ranked(predictions), refused


def _print(predictions: Sequence[Predicted], cluster: Cluster) -> None:
    console.print(Text(f"cluster   {cluster.name}: {cluster.provenance}"), soft_wrap=True)
    if len(predictions) > 1:
        console.print(comparison_table(predictions[:_MAX_ROWS]))
        if len(predictions) > _MAX_ROWS:
            words = f"and {len(predictions) - _MAX_ROWS} more: see --output"
            console.print(words, highlight=False)
        return
    (found,) = predictions
    for line in configuration_lines(found):
        console.print(Text(line), soft_wrap=True)
    console.print(breakdown_table(found))
    console.print(device_memory_table(found))
    if found.missing_bytes:
        words = f"memory    OUT OF MEMORY by {bytes_text(found.missing_bytes)}"
        console.print(Text(words, style="bold red"), soft_wrap=True)
