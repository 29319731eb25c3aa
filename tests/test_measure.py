"""Profiles counted on fake tensors equal counts of real runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import own
from models.run import run_text, seeded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planner.graph import LayerGraph
from planner.measure import measure
from planner.model_file import model_from_functions
from planner.trace import TracedModel, trace


class Attention(nn.Module):
    """Blocks with causal attention through the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            self.project(self.norm(x)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + found.transpose(1, 2).flatten(-2)


_MODELS = [
    (own.Mlp, own.vectors, own.square),
    (own.ConvNet, own.images, own.classes),
    (own.UNet, own.vectors, own.square),
    (own.Tied, own.tokens, own.classes),
    (own.ClassToken, own.vectors, own.square),
    (own.Frozen, own.vectors, own.square),
    (own.StartsInPlace, own.vectors, own.square),
    (Attention, own.tokens, own.classes),
]


def _traced(build: Any, example_batch: Any, loss_fn: Any) -> TracedModel:
    return trace(model_from_functions(build, example_batch, loss_fn=loss_fn))


class _RealLayer:
    """One layer on real tensors, with hooks of this test's own."""

    def __init__(
        self, model: nn.Module, graph: LayerGraph, index: int, batch: own.Batch, loss_fn: Any
    ) -> None:
        stage = graph.stage_code(index, index)
        specs = graph.tensor_specs
        inputs = {
            name: torch.empty_strided(specs[name].shape, specs[name].stride)
            .normal_()
            .requires_grad_(specs[name].requires_grad)
            for name in stage.inputs
        }
        values: dict[str, Any] = {
            n: x.clone() if n in stage.mutated_inputs else x for n, x in inputs.items()
        }
        named = {**values, **{key: batch[key] for key in stage.batch_keys}}
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x) or x, lambda x: x
        )
        with hooks, FlopCounterMode(display=False) as flop:
            run_text(stage.code, values, model, batch, loss_fn)
        self.forward_flop = flop.get_total_flops()
        named.update({name: values[name] for name in stage.outputs})
        state = [*model.parameters(), *model.buffers()]
        apart = {x.untyped_storage().data_ptr() for x in [*named.values(), *state]}
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        self.saved_bytes = sum(size for key, size in storages.items() if key not in apart)
        self.saved_names = {
            name for name, x in named.items() if x.untyped_storage().data_ptr() in storages
        }
        roots = [values[n] for n in stage.outputs if n == "loss" or specs[n].requires_grad]
        with FlopCounterMode(display=False) as flop:
            if roots:
                torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        self.backward_flop = flop.get_total_flops()


@pytest.mark.parametrize(("build", "example_batch", "loss_fn"), _MODELS)
def test_fake_counts_equal_real_ones(
    build: Callable[[], nn.Module], example_batch: Any, loss_fn: Any
) -> None:
    traced = _traced(build, example_batch, loss_fn)
    graph = traced.layer_graph(3)
    profile = measure(traced, 3)
    with seeded():
        model, batch = build().train(), example_batch(3)
    assert [layer.name for layer in profile.layers] == [layer.name for layer in graph.layers]
    for index, found in enumerate(profile.layers):
        real = _RealLayer(model, graph, index, batch, loss_fn)
        assert found.saved_bytes == real.saved_bytes, found.name
        # What the graph saved and then let go of is not kept.
        assert set(found.saved_tensors) <= real.saved_names, found.name
        if build is not Attention or not found.name.startswith("blocks"):
            assert found.forward_flop == real.forward_flop, found.name
            assert found.backward_flop == real.backward_flop, found.name


def test_attention_is_counted() -> None:
    traced = _traced(Attention, own.tokens, own.classes)
    block = measure(traced, 3).layers[1]
    projection = 2 * 3 * 6 * 8 * 24
    # Two products of 6 x 6 x 4 per sample and head; five in backward.
    product = 2 * 3 * 2 * 6 * 6 * 4
    assert block.forward_flop == projection + 2 * product
    assert block.backward_flop == 2 * projection + 5 * product


def test_linear_by_hand() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}

    profile = measure(_traced(build, example_batch, own.square), 5)
    first, last = profile.layers
    assert first.forward_flop == 2 * 5 * 8 * 16
    # The batch needs no gradient, so backward has one product instead of two.
    assert first.backward_flop == 2 * 5 * 8 * 16
    assert last.backward_flop == 2 * (2 * 5 * 16 * 4)
    assert first.parameter_bytes == 4 * (8 * 16 + 16)
    product = next(count for count in first.forward if count.flop)
    assert product.moved_bytes == 4 * (5 * 8 + 8 * 16 + 16 + 5 * 16)
    assert (product.num_kernels, product.dtype) == (1, "float32")
    # ReLU keeps its result, which is the layer's output; Linear keeps its input.
    assert first.saved_bytes == 0
    assert set(first.saved_tensors) == {"input", graph_output(first.saved_tensors)}
    # Before ReLU and after.
    assert first.forward_transient_bytes == 2 * 4 * 5 * 16
    assert "torch" in first.provenance


def graph_output(names: tuple[str, ...]) -> str:
    return next(name for name in names if name != "input")


def test_sizes_scale() -> None:
    traced = _traced(own.UNet, own.vectors, own.square)
    one, four = measure(traced, 1), measure(traced, 4)
    for small, large in zip(one.layers, four.layers, strict=True):
        assert large.forward_flop == 4 * small.forward_flop
        assert large.saved_bytes >= small.saved_bytes


def test_equal_layers_have_equal_profiles_under_their_own_names() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    traced = _traced(Chain, own.vectors, own.square)
    graph, profile = traced.layer_graph(2), measure(traced, 2)
    for index in (1, 2, 3):
        assert profile.layers[index].forward == profile.layers[1].forward
        assert profile.layers[index].saved_tensors == graph.layers[index].inputs


def test_measuring_leaves_no_gradients() -> None:
    traced = _traced(own.Mlp, own.vectors, own.square)
    measure(traced, 2)
    assert all(parameter.grad is None for parameter in traced.model.parameters())


def test_a_parameter_gradient_is_transient_once() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 4))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 64), "y": torch.randn(batch_size, 4)}

    first = measure(_traced(build, example_batch, own.square), 1).layers[0]
    weight = 4 * 64 * 64
    assert weight <= first.backward_transient_bytes < 2 * weight


def test_a_gradient_that_came_to_lie_elsewhere_is_not_passed_on() -> None:
    """What it takes may lie where the gradient of the output lay, which is gone by then."""

    class Scaled(nn.Module):
        def __init__(self, num_times: int) -> None:
            super().__init__()
            self.linear, self.num_times = nn.Linear(8, 8), num_times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            for _ in range(self.num_times):
                x = x * 2
            return x

    def build() -> nn.Module:
        return nn.Sequential(*map(Scaled, range(6)), nn.Linear(8, 4))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}

    profile = measure(_traced(build, example_batch, own.square), 2)
    memories = [layer.memory for layer in profile.layers]
    assert [memory.passed_gradients for memory in memories if memory is not None] == [()] * 7
