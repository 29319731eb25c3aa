"""Tracing and profiling grow with the number of layers, not with its square, and do equals once."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.graph import LayerGraph
from planner.measure import measure
from planner.measure.alone import LayerAlone
from planner.model_file import ModelFile, model_from_functions
from planner.trace import TracedModel, trace

SIZES = (32, 64, 128)
WORK = ("planner/", "torch/nn/modules/module.py")


def mlp(num_layers: int, *, equal: bool = True) -> ModelFile:
    widths = [8 if equal else 8 + layer for layer in range(num_layers + 1)]

    def batch(size: int) -> dict[str, Tensor]:
        return {"input": torch.randn(size, widths[0])}

    def build() -> nn.Module:
        return nn.Sequential(*[nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers)])

    return model_from_functions(build, batch, loss_fn=lambda output, _: output.square().mean())


def num_calls(work: Callable[[], Any]) -> int:
    """Python calls in the planner and in what lists modules' parameters."""
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        name = frame.f_code.co_filename
        count += event == "call" and (WORK[0] in name or name.endswith(WORK[1]))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def assert_linear(counts: list[int]) -> None:
    """Sizes double: so does the growth from one to the next, up to a fifth for what is square."""
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert 0 < second <= 2.2 * first, counts


def test_tracing_is_linear() -> None:
    counts = []
    for size in SIZES:
        traced = trace(mlp(size))
        counts.append(num_calls(lambda traced=traced: traced.layer_graph(1)))  # type: ignore[misc]
    assert_linear(counts)


@pytest.mark.parametrize("equal", [True, False])
def test_profiling_is_linear(equal: bool) -> None:
    counts = []
    for size in SIZES:
        traced = trace(mlp(size // (1 if equal else 4), equal=equal))
        traced.layer_graph(1)
        counts.append(num_calls(lambda traced=traced: measure(traced, 1)))  # type: ignore[misc]
    assert_linear(counts)


def test_stages_of_one_layer_are_linear() -> None:
    counts = []
    for size in SIZES:
        graph = trace(mlp(size)).layer_graph(1)
        counts.append(num_calls(lambda graph=graph: all_stages(graph)))  # type: ignore[misc]
    assert_linear(counts)


def all_stages(graph: LayerGraph) -> None:
    for index in range(len(graph.layers)):
        graph.stage_code(index, index)


@pytest.mark.parametrize(("equal", "num_distinct"), [(True, 3), (False, 12)])
def test_equal_layers_run_once(
    equal: bool, num_distinct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    forward = LayerAlone.forward

    def noted(run: LayerAlone, **how: Any) -> Any:
        if how.get("saving", True):
            runs.append(run.stage.outputs[0])
        return forward(run, **how)

    monkeypatch.setattr(LayerAlone, "forward", noted)
    traced: TracedModel = trace(mlp(12, equal=equal))
    measure(traced, 1)
    signatures = {layer.signature for layer in traced.layer_graph(1).layers}
    assert len(runs) == len(signatures) == num_distinct
