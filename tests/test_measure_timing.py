"""Layers on real tensors: what is materialised, what is run, and what it needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import own
from torch import nn
from zoo import PATHS

from planner.errors import ModelFileError
from planner.measure.clock import seconds_of
from planner.measure.measured import MeasuredSize
from planner.measure.optimizer_state import measure_optimizer
from planner.measure.real_model import RealModel, random_values
from planner.measure.timing import time_layers
from planner.model_file import ModelFile, load_model_file, model_from_functions
from planner.trace import trace

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "examples"


def timed(model_file: ModelFile, micro_batch_size: int, num_repeats: int = 1) -> MeasuredSize:
    return time_layers(trace(model_file), micro_batch_size, CPU, num_repeats=num_repeats)


@pytest.mark.parametrize(
    ("build", "example_batch", "loss_fn"),
    [
        (own.Mlp, own.vectors, own.square),
        (own.ConvNet, own.images, own.classes),
        pytest.param(own.UNet, own.vectors, own.square, marks=pytest.mark.slow),
        (own.Tied, own.tokens, own.classes),
        pytest.param(own.ClassToken, own.vectors, own.square, marks=pytest.mark.slow),
        (own.Frozen, own.vectors, own.square),
        pytest.param(own.StartsInPlace, own.vectors, own.square, marks=pytest.mark.slow),
    ],
)
def test_odd_models_are_timed(build: Any, example_batch: Any, loss_fn: Any) -> None:
    size = timed(model_from_functions(build, example_batch, loss_fn=loss_fn), 2)
    for layer in size.layers:
        profile = layer.profile
        assert layer.forward_peak_bytes == profile.forward_transient_bytes
        assert layer.backward_peak_bytes == profile.backward_transient_bytes
        assert layer.forward.median > 0
        assert profile.forward_seconds == layer.forward.median
        assert profile.recompute_seconds == layer.recompute.median > 0
        assert (layer.backward.median > 0) == bool(profile.backward)
        assert (layer.update.median == 0) == (profile.update_seconds == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "resnet", "unet"])
def test_measured_peaks_are_the_counted_ones(name: str) -> None:
    for layer in timed(load_model_file(str(EXAMPLES / f"{name}.py")), 2).layers:
        counted = layer.profile.forward_transient_bytes, layer.profile.backward_transient_bytes
        assert layer.forward_peak_bytes == pytest.approx(counted[0], rel=0.01, abs=1000)
        assert layer.backward_peak_bytes == pytest.approx(counted[1], rel=0.01, abs=1000)


def test_layers_that_checkpoint_themselves_are_timed() -> None:
    """One of them re-entrantly, which works only where backward is asked for all gradients."""
    checkpointed = load_model_file(str(PATHS["checkpointed"]))
    for layer in timed(checkpointed, 2).layers:
        assert layer.backward.median > 0
        assert layer.forward_peak_bytes == layer.profile.forward_transient_bytes
        assert layer.backward_peak_bytes == layer.profile.backward_transient_bytes


def test_more_work_takes_longer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 8))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 8)}

    first, middle, _ = timed(
        model_from_functions(build, example_batch, loss_fn=own.square), 256, num_repeats=5
    ).layers
    assert middle.forward.median > first.forward.median
    assert middle.backward.median > first.backward.median
    assert middle.update.median > first.update.median


def test_layers_without_trained_parameters_have_no_update() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        model[0].requires_grad_(False)
        return model

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}

    first, second, _ = timed(
        model_from_functions(build, example_batch, loss_fn=own.square), 2
    ).layers
    assert first.update.median == first.backward.median == 0
    assert second.update.median > 0


@pytest.mark.parametrize(
    ("build", "kept_bytes"),
    [
        (None, 2 * 4 * (8 * 8 + 8) + 2 * 4),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1), 0, marks=pytest.mark.slow),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4 * (8 * 8 + 8)),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3 * 4 * (8 * 8 + 8) + 2 * 4),
        (torch.optim.Adafactor, 4 * (8 + 8) + 4 * 8 + 2 * 4),  # a row and a column; a bias whole
    ],
)
def test_bytes_of_the_optimizer_are_counted_and_foretold(build: Any, kept_bytes: int) -> None:
    def build_model() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        model[0].requires_grad_(False)
        return model

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}

    model_file = replace(
        model_from_functions(build_model, example_batch, loss_fn=own.square), build_optimizer=build
    )
    graph = trace(model_file).layer_graph(2)
    foretold = measure_optimizer(model_file, graph.parameters).num_bytes
    layers = timed(model_file, 2).layers
    assert [layer.optimizer_bytes for layer in layers[:2]] == [0, kept_bytes]
    for layer, node in zip(layers, graph.layers, strict=True):
        assert layer.optimizer_bytes == sum(foretold.get(name, 0) for name in node.parameters)


class _Indices(nn.Module):
    """Makes indices that only it can make right: from 5 on, in order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argsort(dim=-1) + 5


class _LooksUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 8)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(indices - 5, 8) * self.table(indices)


def test_indices_between_layers_are_those_that_were_made() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), _Indices(), _LooksUp(), nn.Linear(8, 4))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 8, 4)}

    # Indices of 0 would be -5 to `one_hot`, which refuses it.
    assert timed(model_from_functions(build, example_batch, loss_fn=own.square), 2).layers


class _Large(nn.Module):
    """A thousand million parameters in ten layers, a buffer with values, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.plain = torch.arange(3)
        self.layers = nn.ModuleList(nn.Linear(10_000, 10_000) for _ in range(10))
        shared = nn.Parameter(torch.ones(4, 4))
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one.weight = shared
        self.other.weight = shared


def test_only_the_layer_under_test_is_materialised() -> None:
    real = RealModel(model_from_functions(_Large, own.vectors))
    model = real.with_parameters(["layers.3.bias", "one.weight"], CPU)
    found = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert found == {"layers.3.bias", "one.weight"}
    assert model.get_parameter("one.weight") is model.get_parameter("other.weight")
    assert 0 < model.get_parameter("one.weight").std().item() < 0.1
    assert model.get_buffer("table").tolist() == [0, 1, 2, 3]
    assert model.plain.tolist() == [0, 1, 2]  # type: ignore[union-attr, operator]
    assert model.training
    again = real.with_parameters(["one.bias"], CPU)
    assert again.get_parameter("one.weight").is_meta
    assert again.get_buffer("table").data_ptr() != model.get_buffer("table").data_ptr()


def test_a_model_that_reads_its_parameters_is_built_whole() -> None:
    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        model.register_buffer("start", torch.zeros(3))
        if not model.start.is_meta:
            model.start.fill_(model.weight.abs().sum().item())
        return model

    model = RealModel(model_from_functions(build, own.vectors)).with_parameters(["bias"], CPU)
    assert float(model.get_buffer("start").abs().sum()) > 0
    assert not model.get_parameter("bias").is_meta


def test_a_model_that_cannot_be_built_says_where() -> None:
    def build() -> nn.Module:
        raise ValueError("no such size")

    with pytest.raises(ModelFileError, match="no such size"):
        RealModel(model_from_functions(build, own.vectors, name="broken"))


@pytest.mark.parametrize(
    ("shape", "stride"), [((2, 3), (3, 1)), ((2, 3), (0, 1)), ((), ()), ((0, 3), (3, 1))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_values_of_every_layout(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = random_values(shape, stride, dtype, CPU)
    assert (tuple(values.shape), values.stride(), values.dtype) == (shape, stride, dtype)
    if dtype is torch.bool:
        assert values.all()


def test_median_and_spread() -> None:
    assert seconds_of([3.0]).median == 3.0
    assert seconds_of([3.0]).spread == 0.0
    found = seconds_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.spread) == (3.0, 2.0)
