"""How the solver's time grows with layers and devices: `python benchmarks/solve_scale.py`.

Solves chains of unequal layers, made by hand, with the simulator as judge: no model is traced. Each
row gives the seconds of the search and the gap that it proves. Then as many layers on 64 pipeline
ranks with 8 stages each, where all of the work is in the cuts.
"""

import random
import time
from dataclasses import replace

import click
from rich.console import Console
from rich.table import Table

from planner.cluster.resolve import resolve_cluster
from planner.export.skeleton import StageCosts, chain_model
from planner.graph import LayerGraph, TensorSpec
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import LayerProfile, Profile
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
FIXED_BATCH = 128


@click.command()
@click.option("--time-limit", type=float, default=20.0, show_default=True, help="Of each search.")
@click.option("--largest", type=int, default=1000, show_default=True, help="Most layers.")
def main(time_limit: float, largest: int) -> None:
    """Print seconds, step and gap of each size."""
    table = Table(title="solving chains of unequal layers")
    for column in ("layers", "devices", "mesh", "stages", "seconds", "step", "gap"):
        table.add_column(column, justify="right")
    for num_layers, num_devices in SIZES:
        if num_layers <= largest:
            batch = SAMPLES_PER_DEVICE * num_devices
            _add(table, _problem(num_layers, num_devices, batch, time_limit))
    if largest >= 1000:
        fixed = _problem(1000, 64, FIXED_BATCH, time_limit)
        _add(table, replace(fixed, constraints=FIXED, memory_limit_bytes=2**50))
    Console().print(table)


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


def _add(table: Table, problem: Problem) -> None:
    num_layers = len(problem.graph_at(1).layers)
    started = time.process_time()
    solution = _solved(problem)
    seconds = time.process_time() - started
    placement = solution.placement
    table.add_row(
        str(num_layers),
        str(problem.num_devices),
        f"{placement.num_replicas} x {placement.num_pipeline_ranks}",
        str(placement.num_stages),
        f"{seconds:.1f}",
        f"{solution.step_seconds:.3f} s",
        f"{solution.gap:.2%}",
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
