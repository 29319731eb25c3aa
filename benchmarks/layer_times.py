"""Do measured layers add up to a measured step? `python benchmarks/layer_times.py`.

One process, one rank, one thread. Per model: the sum over layers of forward and backward, times
micro-batches, plus updates, against a whole step of plain training and of the runtime; and the step
that a plan with the measured profile predicts. Layers and whole steps take turns, so that what
disturbs the machine disturbs both; every figure is a median.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import click
import torch
from models.sized import MODELS, SizedModel
from rich.console import Console
from rich.table import Table

from planner.cluster import resolve_cluster
from planner.measure.clock import Seconds
from planner.measure.measured import MeasuredLayer, MeasuredSize
from planner.measure.session import measured_model
from planner.measure.timing import time_layers
from planner.model_file import ModelFile
from planner.pipeline import make_plan
from planner.solve import Constraints
from planner.trace import TracedModel, trace
from runtime.build import build_model, make_executor
from runtime.local import LocalHub, LocalTransport
from runtime.optimize import default_optimizer
from runtime.reference import loss_of_model

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Seconds of one step."""

    layers: float
    """Sum of the measured layers."""
    eager: float
    runtime: float
    predicted: float


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--micro-batches", type=click.IntRange(min=1), default=4, show_default=True)
def main(names: tuple[str, ...], rounds: int, repeats: int, micro_batches: int) -> None:
    """Print a row per model (all by default), and the median deviation over them.

    In each round every layer runs `--repeats` times, and then as many steps of each kind.
    """
    torch.set_num_threads(1)
    table = Table(title=f"a step of {micro_batches} micro-batches on one thread")
    table.add_column("model")
    columns = (
        "sum of layers",
        "eager step",
        "ratio",
        "runtime step",
        "ratio",
        "predicted",
        "ratio",
    )
    for column in columns:
        table.add_column(column, justify="right")
    found = []
    for name in names or MODELS:
        figures = compare(MODELS[name], rounds, repeats, micro_batches)
        found.append(figures)
        table.add_row(
            name,
            f"{figures.layers * 1e3:.1f} ms",
            f"{figures.eager * 1e3:.1f} ms",
            f"{figures.layers / figures.eager:.3f}",
            f"{figures.runtime * 1e3:.1f} ms",
            f"{figures.layers / figures.runtime:.3f}",
            f"{figures.predicted * 1e3:.1f} ms",
            f"{figures.predicted / figures.runtime:.3f}",
        )
    console = Console(width=120)
    console.print(table)
    for what, ratios in (
        ("sum of layers against the eager step", [f.layers / f.eager for f in found]),
        ("sum of layers against the runtime's step", [f.layers / f.runtime for f in found]),
        ("predicted against the runtime's step", [f.predicted / f.runtime for f in found]),
    ):
        deviation = statistics.median(abs(ratio - 1) for ratio in ratios)
        console.print(f"{what}: median deviation {deviation:.1%}")


def compare(sized: SizedModel, rounds: int, repeats: int, micro_batches: int) -> Figures:
    """Layers and steps of one model, in turns."""
    model_file, size = sized.model_file(), sized.micro_batch_size
    traced = trace(model_file)
    eager = _eager_step(model_file, size, micro_batches)
    runtime = _runtime_step(model_file, size, micro_batches)
    measured, eager_seconds, runtime_seconds = [], [], []
    for _ in range(rounds):
        measured.append(time_layers(traced, size, CPU, num_repeats=repeats))
        eager_seconds.append(_median_seconds(eager, repeats))
        runtime_seconds.append(_median_seconds(runtime, repeats))
    layers = _merged(measured)
    return Figures(
        layers=math.fsum(
            (micro_batches * (layer.forward.median + layer.backward.median) + layer.update.median)
            * len(layer.layers)
            for layer in layers.layers
        ),
        eager=statistics.median(eager_seconds),
        runtime=statistics.median(runtime_seconds),
        predicted=_predicted(traced, layers, micro_batches),
    )


def _eager_step(model_file: ModelFile, size: int, micro_batches: int) -> Callable[[], None]:
    """Plain accumulation, and the optimizer's step."""
    model = build_model(model_file, 0, CPU)
    optimizer = (model_file.build_optimizer or default_optimizer)(list(model.parameters()))
    batches = [model_file.example_batch(size) for _ in range(micro_batches)]
    loss_of = loss_of_model(model, model_file)

    def step() -> None:
        for batch in batches:
            (loss_of(batch) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _runtime_step(model_file: ModelFile, size: int, micro_batches: int) -> Callable[[], None]:
    plan = make_plan(
        model_file,
        num_devices=1,
        cluster=resolve_cluster("cpu", 1),
        global_batch_size=size * micro_batches,
        constraints=_constraints(size, micro_batches),
    ).plan
    hub = LocalHub(plan.grid, plan.options.deadline_seconds)
    executor = make_executor(plan, model_file, LocalTransport(hub, 0), 0, CPU)
    batch = model_file.example_batch(size * micro_batches)

    def step() -> None:
        executor.step(batch)

    return step


def _constraints(size: int, micro_batches: int) -> Constraints:
    return Constraints(
        num_replicas=1,
        num_pipeline_ranks=1,
        stages_per_rank=1,
        micro_batch_size=size,
        num_micro_batches=micro_batches,
        partition=0,
        recompute=False,
    )


def _median_seconds(step: Callable[[], None], repeats: int) -> float:
    """After one step that does not count."""
    step()
    samples = []
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    gc.enable()
    return statistics.median(samples)


def _merged(rounds: Sequence[MeasuredSize]) -> MeasuredSize:
    """Medians over the rounds."""
    layers = [_merged_layer(layers) for layers in zip(*(r.layers for r in rounds), strict=True)]
    return replace(rounds[0], layers=tuple(layers))


def _merged_layer(rounds: Sequence[MeasuredLayer]) -> MeasuredLayer:
    def median(part: str) -> Seconds:
        values = [getattr(layer, part).median for layer in rounds]
        return Seconds(median=statistics.median(values), spread=0.0)

    parts = {part: median(part) for part in ("forward", "backward", "recompute", "update")}
    return replace(rounds[0], **parts)


def _predicted(traced: TracedModel, layers: MeasuredSize, micro_batches: int) -> float:
    """The step that a plan with these layers promises."""
    size = layers.micro_batch_size
    plan = make_plan(
        traced.model_file,
        num_devices=1,
        cluster=resolve_cluster("cpu", 1),
        global_batch_size=size * micro_batches,
        constraints=_constraints(size, micro_batches),
        measured=measured_model(traced, [layers], CPU, num_repeats=1, command=""),
    ).plan
    assert plan.prediction is not None
    return plan.prediction.step_seconds


if __name__ == "__main__":
    main()
