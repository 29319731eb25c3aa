"""How the solver's time grows with layers and devices: `python benchmarks/solve_scale.py`.

Solves chains of unequal layers, made by hand, with the simulator as judge: no model is traced. Each
row gives the seconds of the search and the gap that it proves, and the rows of one number of
devices, or of layers, are drawn as a curve. The last rows are as many layers on 64 pipeline ranks
with 8 stages each, where all of the work is in the cuts, by the number of micro-batches.
"""

import csv
import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from planner.cluster.resolve import resolve_cluster
from planner.export.skeleton import StageCosts, chain_model
from planner.files import write_whole
from planner.graph import LayerGraph, TensorSpec
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import LayerProfile, Profile
from planner.report.plot import Curve, plot_svg, plot_text
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated, Solution, solve

SIZES = ((24, 8), (48, 64), (96, 512), (96, 4096), (96, 16384), (200, 64), (400, 64), (1000, 64))
"""Layers and devices."""
SAMPLES_PER_DEVICE = 8
PARAMETERS_PER_LAYER = 100_000_000
TENSOR_BYTES = 32 * 2**20
"""Of what passes between layers, for one sample."""
SECONDS = 0.01
"""Of a sample's forward through the cheapest layer; the dearest takes three times as long."""
FIXED = Constraints(num_replicas=1, num_pipeline_ranks=64, stages_per_rank=8, micro_batch_size=1)
FIXED_SIZE = (1000, 64)
FIXED_BATCH = 128
FIXED_BATCHES = (16, 32, 64, FIXED_BATCH)
# "batches" are micro-batches.
COLUMNS = ("layers", "devices", "mesh", "stages", "batches", "seconds", "step", "gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem, solved."""

    num_layers: int
    num_devices: int
    placement: Placement
    is_fixed: bool
    """Mesh and number of stages were demanded."""
    seconds: float
    """Of the processor, for the search and all simulations."""
    step_seconds: float
    gap: float

    def cells(self) -> tuple[str, ...]:
        placement = self.placement
        return (
            str(self.num_layers),
            str(self.num_devices),
            f"{placement.num_replicas} x {placement.num_pipeline_ranks}",
            str(placement.num_stages),
            str(placement.num_micro_batches),
            f"{self.seconds:.1f}",
            f"{self.step_seconds:.3f} s",
            f"{self.gap:.2%}",
        )


@click.command()
@click.option("--time-limit", type=float, default=20.0, show_default=True, help="Of each search.")
@click.option("--largest", type=int, default=1000, show_default=True, help="Most layers.")
@click.option("--only", type=click.Choice(["free", "fixed"]), help="One kind of row.")
@click.option("--num-devices", type=int, help="Only rows of so many devices.")
@click.option("--micro-batches", type=int, help="Only fixed rows of so many micro-batches.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the table there.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path), help="Draw the curves there.")
def main(
    time_limit: float,
    largest: int,
    only: str | None,
    num_devices: int | None,
    micro_batches: int | None,
    csv_path: Path | None,
    svg_path: Path | None,
) -> None:
    """Print seconds, step and gap of each size, and the curves."""
    sizes = [one for one in SIZES if one[0] <= largest and num_devices in (None, one[1])]
    batches = [count for count in FIXED_BATCHES if micro_batches in (None, count)]
    if FIXED_SIZE[0] > largest or num_devices not in (None, FIXED_SIZE[1]):
        batches = []
    rows = [_free_row(size, time_limit) for size in sizes if only != "fixed"]
    rows += [_fixed_row(batch, time_limit) for batch in batches if only != "free"]
    console, curves = Console(), _curves(rows)
    table = Table(title="solving chains of unequal layers")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    for curve in curves:
        console.print(*plot_text(curve), sep="\n")
    if csv_path is not None:
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *(row.cells() for row in rows)])
        write_whole(csv_path, text.getvalue().encode())
    if svg_path is not None and curves:
        write_whole(svg_path, plot_svg(curves).encode())


def _curves(rows: Sequence[Row]) -> list[Curve]:
    """Seconds and gap over layers and over devices, where there are rows to compare."""
    free = [row for row in rows if not row.is_fixed]
    across = [row for row in free if row.num_devices == FIXED_SIZE[1]]
    along = [row for row in free if row.num_layers == 96]
    found = []
    for chosen, name, title in (
        (across, "num_layers", "64 devices"),
        (along, "num_devices", "96 layers"),
    ):
        if len(chosen) < 2:
            continue
        seconds = [(getattr(row, name), row.seconds) for row in chosen]
        gaps = [(getattr(row, name), 100 * row.gap) for row in chosen]
        for label, text, points in (("seconds", _seconds, seconds), ("gap", _percent, gaps)):
            curve = Curve(
                title=title,
                x_label=name.removeprefix("num_"),
                y_label=label,
                points=points,
                x_text=_count,
                y_text=text,
            )
            found.append(curve)
    return found


def _count(value: float) -> str:
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _problem(num_layers: int, num_devices: int, batch: int, time_limit: float) -> Problem:
    generator = random.Random(num_layers)
    seconds = [SECONDS * generator.uniform(1.0, 3.0) for _ in range(num_layers)]
    costs = StageCosts(tensor_bytes=TENSOR_BYTES, num_parameters=PARAMETERS_PER_LAYER)
    graph, profile = chain_model(num_layers, costs)

    def graph_at(size: int) -> LayerGraph:
        return replace(
            graph,
            micro_batch_size=size,
            tensors=tuple(_sized(tensor, size) for tensor in graph.tensors),
        )

    def profile_at(size: int) -> Profile:
        pairs = zip(profile.layers, seconds, strict=True)
        layers = tuple(_layer(layer, size, forward) for layer, forward in pairs)
        return replace(profile, micro_batch_size=size, layers=layers)

    return Problem(
        graph_at=graph_at,
        profile_at=profile_at,
        cluster=resolve_cluster("a100-80", num_devices),
        num_devices=num_devices,
        global_batch_size=batch,
        time_limit_seconds=time_limit,
    )


def _sized(tensor: TensorSpec, size: int) -> TensorSpec:
    return replace(tensor, shape=(size, *tensor.shape))


def _layer(layer: LayerProfile, size: int, forward_seconds: float) -> LayerProfile:
    return replace(
        layer,
        saved_bytes=8 * TENSOR_BYTES * size,
        backward_transient_bytes=2 * TENSOR_BYTES * size,
        forward_seconds=forward_seconds * size,
        backward_seconds=2 * forward_seconds * size,
    )


def _free_row(size: tuple[int, int], time_limit: float) -> Row:
    """Everything is left to the search."""
    return _row(_problem(*size, SAMPLES_PER_DEVICE * size[1], time_limit), is_fixed=False)


def _fixed_row(batch: int, time_limit: float) -> Row:
    """Of the demanded mesh and stages, without a memory limit to speak of."""
    problem = _problem(*FIXED_SIZE, batch, time_limit)
    demanded = replace(problem, constraints=FIXED, memory_limit_bytes=2**50)
    return _row(demanded, is_fixed=True)


def _row(problem: Problem, *, is_fixed: bool) -> Row:
    started = time.process_time()
    solution = _solved(problem)
    return Row(
        num_layers=len(problem.graph_at(1).layers),
        num_devices=problem.num_devices,
        placement=solution.placement,
        is_fixed=is_fixed,
        seconds=time.process_time() - started,
        step_seconds=solution.step_seconds,
        gap=solution.gap,
    )


def _solved(problem: Problem) -> Solution:
    def judged(placement: Placement) -> Simulated:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        found = simulate(lower(graph, profile, problem.cluster, placement, PlanOptions()))
        return Simulated(step_seconds=found.step_seconds, peak_bytes=found.peak_bytes)

    return solve(problem, judged)


if __name__ == "__main__":
    main()
