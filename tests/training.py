"""Trains a model by a plan and plainly, and compares: the main tests' common ground."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from synthetic import chain_cluster
from torch import Tensor

from planner.graph import LayerGraph
from planner.lower import lower
from planner.measure import measure
from planner.model_file import ModelFile, load_model_file
from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision, with_masters
from planner.profile import Profile
from planner.solve.types import Placement
from planner.trace import TracedModel, trace
from runtime.build import build_model, make_executor
from runtime.data import Batches
from runtime.local import LocalTransport, run_local
from runtime.optimize import default_optimizer
from runtime.reference import accumulate, loss_of_model
from runtime.shards import UnitState
from runtime.transport import Traffic

__all__ = [
    "EXAMPLES", "NUM_STEPS", "Run", "even_plan", "example", "relative_rms", "train_by_plan",
    "train_plainly",
]  # fmt: skip

EXAMPLES = Path(__file__).parent.parent / "examples"
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """Losses by (replica, micro-batch) and gradients by parameter (flat range, values)."""

    losses: dict[tuple[int, int], Tensor]
    gradients: list[tuple[str, int, Tensor]]
    """(parameter, first element, values): whole parameters have first element 0."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Some steps of training."""

    steps: list[Step]
    state: dict[str, Tensor]
    """Parameters and buffers afterwards."""
    traffic: tuple[Traffic, ...] = ()
    """By world rank."""


@functools.cache
def example(name: str, precision: Precision = Precision.MODEL) -> tuple[ModelFile, TracedModel]:
    """An example's model file and its trace, made once."""
    model_file = load_model_file(str(EXAMPLES / f"{name}.py"))
    return model_file, trace(model_file, precision)


@functools.cache
def graph_and_profile(
    name: str, micro_batch_size: int, precision: Precision
) -> tuple[LayerGraph, Profile]:
    _, traced = example(name, precision)
    graph = with_masters(traced.layer_graph(micro_batch_size), precision)
    return graph, measure(traced, micro_batch_size)


def even_plan(
    name: str,
    *,
    num_replicas: int = 1,
    num_pipeline_ranks: int = 1,
    stages_per_rank: int = 1,
    num_micro_batches: int = 1,
    micro_batch_size: int = 2,
    partition: int = 0,
    recompute: bool = False,
    options: PlanOptions | None = None,
    **choices: Any,
) -> Plan:
    """A plan of an example with stages of about equally many layers.

    `choices` are further fields of its Placement.
    """
    options = options or PlanOptions(deadline_seconds=60)
    graph, profile = graph_and_profile(name, micro_batch_size, options.precision)
    num_stages = num_pipeline_ranks * stages_per_rank
    placement = Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_pipeline_ranks,
        boundaries=tuple(round(s * len(graph.layers) / num_stages) for s in range(num_stages + 1)),
        stage_ranks=tuple(stage % num_pipeline_ranks for stage in range(num_stages)),
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        partition=partition,
        recompute=(recompute,) * num_stages,
        **choices,
    )
    cluster = chain_cluster(placement.world_size)
    return lower(graph, profile, cluster, placement, options)


def train_plainly(model_file: ModelFile, plan: Plan, num_steps: int = NUM_STEPS) -> Run:
    """Plain accumulation over the plan's micro-batches, with the user's eager module."""
    model = build_model(model_file, plan.options.seed, torch.device("cpu"))
    batches = Batches(model_file, plan)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = (model_file.build_optimizer or default_optimizer)(trainable)
    scheduler = model_file.build_scheduler(optimizer) if model_file.build_scheduler else None
    steps = []
    for step in range(num_steps):
        micro_batches = [
            (replica, m, _rows(batches.batch(step, replica), plan, m))
            for replica in range(plan.num_replicas)
            for m in range(plan.num_micro_batches)
        ]
        loss_of = loss_of_model(model, model_file)
        losses = accumulate(model, loss_of, micro_batches, seed=plan.options.seed, step=step)
        steps.append(
            Step(
                losses={(r, m): x for (r, m, _), x in zip(micro_batches, losses, strict=True)},
                gradients=[
                    (name, 0, parameter.grad.clone())
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                ],
            )
        )
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return Run(steps=steps, state={k: v.clone() for k, v in model.state_dict().items()})


def train_by_plan(model_file: ModelFile, plan: Plan, num_steps: int = NUM_STEPS) -> Run:
    """The same by the plan, every rank in a thread of this process."""
    batches = Batches(model_file, plan)

    def run_rank(
        transport: LocalTransport, world_rank: int
    ) -> tuple[list[Step], dict[str, Tensor], Traffic]:
        executor = make_executor(plan, model_file, transport, world_rank, torch.device("cpu"))
        gradients: list[tuple[str, int, Tensor]] = []

        def observe(state: UnitState, gradient: Tensor) -> None:
            for piece in state.pieces:
                values = gradient[piece.first - state.first : piece.last - state.first]
                first = piece.first - state.ranges[piece.name][0]
                gradients.append((piece.name, first, values.clone()))

        executor.observe(observe)
        steps = []
        for step in range(num_steps):
            result = executor.step(batches.batch(step, executor.replica))
            losses = {(executor.replica, m): loss for m, loss in enumerate(result.losses)}
            steps.append(Step(losses=losses, gradients=list(gradients)))
            gradients.clear()
        traffic = Traffic(dict(executor.traffic.num_calls), dict(executor.traffic.num_bytes))
        state = executor.state_dict()
        executor.close()
        return steps, state, traffic

    found = run_local(plan, run_rank)
    state: dict[str, Tensor] = {}
    for world_rank, (_, part, _) in enumerate(found):
        if plan.coordinates(world_rank)[1] == 0:
            state.update(part)
    return Run(
        steps=[
            Step(
                losses={k: v for steps, _, _ in found for k, v in steps[i].losses.items()},
                gradients=[g for steps, _, _ in found for g in steps[i].gradients],
            )
            for i in range(num_steps)
        ],
        state=state,
        traffic=tuple(traffic for _, _, traffic in found),
    )


def relative_rms(mine: Tensor, plain: Tensor) -> float:
    """Root-mean-square of the difference over the root-mean-square of `plain`."""
    gap = (mine.double() - plain.double()).square().mean().sqrt()
    scale = plain.double().square().mean().sqrt()
    return float(gap / scale) if scale else float(gap)


def plain_part(run: Run, step: int, name: str, first: int, length: int) -> Tensor:
    """The elements of a plain gradient that a planned rank holds."""
    whole = next(values for key, _, values in run.steps[step].gradients if key == name)
    return whole.reshape(-1)[first : first + length]


def _rows(batch: Mapping[str, Tensor], plan: Plan, micro_batch: int) -> dict[str, Tensor]:
    first = micro_batch * plan.micro_batch_size
    return {key: value[first : first + plan.micro_batch_size] for key, value in batch.items()}
