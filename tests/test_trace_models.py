"""Tracing our own odd models: staged runs are bitwise equal to eager ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import own
from models.run import check_exact
from torch import nn


def test_sequential_inside() -> None:
    graph = check_exact(own.Mlp, own.vectors, own.square, sizes=(1, 2, 5))
    assert [layer.name for layer in graph.layers] == ["net.0", "net.3", "net.5"]
    assert [len(layer.code) for layer in graph.layers] == [3, 2, 2]
    assert graph.num_random_operators == 1
    assert graph.loss_keys == ("y",)
    assert graph.stage_code(2, 2).batch_keys == ("y",)


def test_sequential_itself() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def example_batch(batch_size: int) -> own.Batch:
        batch = own.vectors(batch_size)
        return {"input": batch["x"], "y": batch["y"]}

    graph = check_exact(build, example_batch, own.square)
    assert [layer.name for layer in graph.layers] == ["0", "2"]


def test_one_layer() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    graph = check_exact(One, own.vectors, own.square, sizes=(1, 3))
    assert len(graph.layers) == 1
    assert graph.layers[0].parameters == ("weight",)
    assert graph.tensors == ()


def test_batch_norm_and_in_place() -> None:
    graph = check_exact(own.ConvNet, own.images, own.classes, sizes=(2, 4))
    blocks = [layer for layer in graph.layers if layer.name.startswith("blocks")]
    # The mean that follows the last block belongs to it.
    assert len({layer.signature for layer in blocks[:2]}) == 1
    assert blocks[2].signature != blocks[1].signature
    assert blocks[0].buffer_bytes == 2 * 4 * 4 + 8
    assert not any(layer.mutated_inputs for layer in graph.layers)


def test_layer_that_changes_its_input() -> None:
    graph = check_exact(own.StartsInPlace, own.vectors, own.square)
    assert graph.layers[1].mutated_inputs == graph.layers[1].inputs
    assert graph.stage_code(0, 1).mutated_inputs == ()


def test_long_skips() -> None:
    graph = check_exact(own.UNet, own.vectors, own.square, sizes=(1, 3))
    makers = graph.makers
    distances = {
        reader - makers[name] for name, readers in graph.readers.items() for reader in readers
    }
    assert max(distances) > 2
    assert graph.to_networkx().number_of_edges() > len(graph.layers) - 1


def test_tied_through_glue() -> None:
    graph = check_exact(own.Tied, own.tokens, own.classes, sizes=(1, 2))
    assert "embed.weight" in graph.tied_parameters
    blocks = [layer for layer in graph.layers if layer.name == "encoder.layers.0"]
    assert len(blocks) == 1
    assert graph.num_random_operators > 0


def test_parameters_in_glue() -> None:
    graph = check_exact(own.ClassToken, own.vectors, own.square)
    assert graph.tied_parameters == {"scale": (0, 1, 2)}
    assert "token" in graph.layers[0].parameters
    assert [s.function for s in graph.prologue].count("buffer") == 1
    assert graph.layers[2].buffer_bytes == 8 * 4


def test_frozen_and_unused() -> None:
    graph = check_exact(own.Frozen, own.vectors, own.square)
    trainable = {spec.name for spec in graph.parameters if spec.trainable}
    assert trainable == {"third.one.weight", "third.one.bias", "head.weight", "head.bias"}
    used = {name for layer in graph.layers for name in layer.parameters}
    assert "third.two.weight" in used
    assert "unused.weight" not in used
    assert [tensor.requires_grad for tensor in graph.tensors] == [False, False, True]


def test_shared_module_and_nested_values() -> None:
    def loss_fn(output: Any, batch: own.Batch) -> torch.Tensor:
        return own.square(output["out"], batch)

    # The tied block adds its two gradients; the batch tensor passes through.
    graph = check_exact(own.Shared, own.vectors, loss_fn)
    assert [layer.name for layer in graph.layers] == ["layers.0", "block", "block#2", "layers.1"]
    assert set(graph.tied_parameters) == {"block.linear.weight", "block.linear.bias"}


def test_cut_into_children_where_there_is_one_leaf() -> None:
    graph = check_exact(own.Deep, own.vectors, own.square)
    assert [layer.name for layer in graph.layers] == ["body.one", "body.two"]


def test_writes_into_slices() -> None:
    graph = check_exact(own.Views, own.vectors, own.square, sizes=(1, 4))
    assert any(s.function == "getitem" for s in graph.prologue)


def test_listed_layers() -> None:
    graph = check_exact(
        own.Mlp, own.vectors, own.square, layers=("net.0", "net.1", "net.2", "net.3", "net.4",
                                                  "net.5")
    )  # fmt: skip
    assert [layer.name for layer in graph.layers] == ["net.0", "net.3", "net.5"]


@pytest.mark.parametrize("build", [own.Mlp, own.UNet, own.ClassToken])
def test_sizes_follow_the_batch(build: Callable[[], nn.Module]) -> None:
    small = check_exact(build, own.vectors, own.square, sizes=(1,))
    large = check_exact(build, own.vectors, own.square, sizes=(6,))
    assert [t.name for t in small.tensors] == [t.name for t in large.tensors]
    for one, six in zip(small.tensors, large.tensors, strict=True):
        assert six.num_bytes == 6 * one.num_bytes
    assert small.fingerprint == large.fingerprint
