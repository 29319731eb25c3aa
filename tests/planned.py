"""Small models, plans of them with given stages, and the comparison with plain accumulation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from synthetic import chain_cluster
from torch import Tensor, nn
from training import Run, relative_rms, train_by_plan, train_plainly

from planner.check import check
from planner.lower import lower
from planner.measure import measure
from planner.model_file import ModelFile, model_from_functions
from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision, with_masters
from planner.profile import Profile
from planner.solve.types import Placement
from planner.trace import TracedModel, trace

__all__ = [
    "Chain", "Layer", "assert_same", "model_of", "plan_of", "square", "traced", "vectors"
]  # fmt: skip

Layer = Callable[[], nn.Module]
_PLAIN: dict[tuple[ModelFile, tuple[int, ...]], Run] = {}


class Chain(nn.Module):
    """Some layers and a head."""

    def __init__(self, layer: Layer, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer() for _ in range(num_layers)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.head(x)
        return output


def square(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()


def vectors(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}


def model_of(build: Layer, loss_fn: Any = square, batch: Any = vectors) -> ModelFile:
    return model_from_functions(build, batch, loss_fn=loss_fn)


@functools.cache
def traced(model_file: ModelFile, precision: Precision = Precision.MODEL) -> TracedModel:
    """The model's trace, made once."""
    return trace(model_file, precision, model_file.keep_float32)


@functools.cache
def _profile(model_file: ModelFile, micro_batch_size: int, precision: Precision) -> Profile:
    return measure(traced(model_file, precision), micro_batch_size)


def plan_of(
    model_file: ModelFile,
    boundaries: tuple[int, ...],
    *,
    num_pipeline_ranks: int = 1,
    num_replicas: int = 1,
    num_micro_batches: int = 3,
    micro_batch_size: int = 2,
    recompute: bool = False,
    partition: int = 3,
    options: PlanOptions | None = None,
    stage_ranks: tuple[int, ...] | None = None,
    **choices: Any,
) -> Plan:
    """A plan with these stages, s on rank s mod P unless `stage_ranks` says where.

    `choices` are further fields of its Placement.
    """
    options = options or PlanOptions(deadline_seconds=20)
    precision = options.precision
    graph = with_masters(traced(model_file, precision).layer_graph(micro_batch_size), precision)
    assert boundaries[-1] == len(graph.layers)
    num_stages = len(boundaries) - 1
    placement = Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_pipeline_ranks,
        boundaries=boundaries,
        stage_ranks=stage_ranks or tuple(s % num_pipeline_ranks for s in range(num_stages)),
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        partition=partition if num_replicas > 1 else 0,
        recompute=(recompute,) * num_stages,
        **choices,
    )
    cluster = chain_cluster(placement.world_size)
    profile = _profile(model_file, micro_batch_size, precision)
    plan = lower(graph, profile, cluster, placement, options)
    verdict = check(plan)
    assert verdict.passed, verdict
    return plan


def assert_same(model_file: ModelFile, plan: Plan, tolerance: float = 0.0) -> None:
    """Losses and first gradients; with one replica also what three steps leave."""
    mine, plain = train_by_plan(model_file, plan), _plainly(model_file, plan)
    assert mine.steps[0].losses.keys() == plain.steps[0].losses.keys()
    for key, loss in plain.steps[0].losses.items():
        assert torch.equal(loss, mine.steps[0].losses[key]), key
    strides = {name: p.stride() for name, p in model_file.build_model().named_parameters()}
    for name, first, values in mine.steps[0].gradients:
        gradient = _plain_gradient(plain, name, strides[name])
        want = gradient[first : first + values.numel()]
        assert relative_rms(values.reshape(-1), want) <= tolerance, name
    if not tolerance:
        for name, value in mine.state.items():
            assert torch.equal(value, plain.state[name]), name


def _plainly(model_file: ModelFile, plan: Plan) -> Run:
    """Plain training, once for all plans of the same work."""
    work = (plan.num_replicas, plan.num_micro_batches, plan.micro_batch_size, plan.options.seed)
    found = _PLAIN.get((model_file, work))
    if found is None:
        found = _PLAIN[model_file, work] = train_plainly(model_file, plan)
    return found


def _plain_gradient(run: Run, name: str, stride: tuple[int, ...]) -> Tensor:
    """In the order in which the parameter's elements lie in memory."""
    found = next(gradient for key, _, gradient in run.steps[0].gradients if key == name)
    return (
        torch.empty_strided(found.shape, stride)
        .to(found)
        .copy_(found)
        .as_strided((found.numel(),), (1,))
    )
