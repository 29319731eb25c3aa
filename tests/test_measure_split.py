"""What tensor parallelism would split of real traced layers: exact all-reduces, and what is left.

A transformer block of batch b, length s and width h has two all-reduces of b s h elements forward
and two backward (Megatron-LM), and every product in it is divided.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.measure import measure, with_splits
from planner.model_file import load_model_file, model_from_functions
from planner.profile import LayerProfile, OperatorClass, Profile
from planner.trace import trace

ZOO = Path(__file__).resolve().parent / "zoo"
SIZE = 2
_WORK = {OperatorClass.PRODUCT, OperatorClass.ATTENTION, OperatorClass.CONVOLUTION}


@cache
def zoo_profiles(name: str) -> tuple[Profile, Profile]:
    """Without and with splits."""
    traced = trace(load_model_file(str(ZOO / f"{name}.py")))
    plain = measure(traced, SIZE)
    return plain, with_splits(traced, plain)


def layer(name: str, path: str) -> LayerProfile:
    return next(found for found in zoo_profiles(name)[1].layers if found.name == path)


def unsplit_flop(found: LayerProfile) -> int:
    return sum(
        count.flop * count.num_kernels
        for count in (*found.forward, *found.backward)
        if not count.split
    )


@pytest.mark.parametrize(
    ("model", "path", "elements"),
    [
        ("gpt2", "transformer.h.1", SIZE * 8 * 16),
        ("llama", "model.layers.1", SIZE * 8 * 16),
        pytest.param("bert", "bert.encoder.layer.0", SIZE * 12 * 16, marks=pytest.mark.slow),
        pytest.param("t5", "encoder.block.1", SIZE * 8 * 16, marks=pytest.mark.slow),
        pytest.param("vit", "vit.layers.0", SIZE * 5 * 16, marks=pytest.mark.slow),
    ],
)
def test_a_block_is_split_as_megatron_splits_it(model: str, path: str, elements: int) -> None:
    found = layer(model, path)
    assert found.forward_all_reduce_bytes == (4 * elements,) * 2
    assert found.backward_all_reduce_bytes == (4 * elements,) * 2
    assert unsplit_flop(found) == 0
    assert found.forward_flop > 0
    assert found.split is not None
    assert found.split.pieces == 2  # heads, or heads of keys and values


def test_a_decoder_block_with_cross_attention_has_one_more() -> None:
    found = layer("t5", "decoder.block.0")
    target, source = 4 * SIZE * 6 * 16, 4 * SIZE * 8 * 16
    assert found.forward_all_reduce_bytes == (target,) * 3
    # The gradient of the encoder's output is one more sum.
    assert sorted(found.backward_all_reduce_bytes) == [*(target,) * 3, source]
    assert unsplit_flop(found) == 0


def test_a_bias_between_layers_stays_split_by_heads() -> None:
    first, second = layer("t5", "encoder.block.0"), layer("t5", "encoder.block.1")
    assert first.split is not None
    assert second.split is not None
    assert first.split.tensors == second.split.tensors != ()


def test_experts_are_split_inside_and_their_router_is_not() -> None:
    found = layer("mixtral", "model.layers.0")
    block = 4 * SIZE * 8 * 16
    assert found.forward_all_reduce_bytes == (block, block)
    assert found.backward_all_reduce_bytes.count(block) == 2
    assert max(found.backward_all_reduce_bytes) == block
    router = 2 * SIZE * 8 * 16 * 4  # multiply and add, rows, width, experts
    assert unsplit_flop(found) == 3 * router


def test_a_vocabulary_is_split_in_the_embedding_and_in_the_head() -> None:
    embedding, head = layer("gpt2", "transformer.wte"), layer("gpt2", "lm_head")
    assert embedding.forward_all_reduce_bytes == (4 * SIZE * 8 * 16,)
    assert embedding.split is not None
    assert embedding.split.parameter_bytes == embedding.parameter_bytes
    # Of each row the largest logit, the sum of exponentials, and its own share of the loss.
    assert unsplit_flop(head) == 0
    assert max(head.forward_all_reduce_bytes) == 4 * SIZE * 8
    assert head.backward_all_reduce_bytes.count(4 * SIZE * 8 * 16) == 1


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5", "mixtral", "resnet"])
def test_splits_change_no_count(model: str) -> None:
    plain, split = zoo_profiles(model)
    for one, other in zip(plain.layers, split.layers, strict=True):
        assert one.forward_flop == other.forward_flop
        assert one.backward_flop == other.backward_flop
        for before, after in ((one.forward, other.forward), (one.backward, other.backward)):
            kernels = [sum(c.num_kernels for c in counts) for counts in (before, after)]
            moved = [
                sum(c.num_kernels * c.moved_bytes for c in counts) for counts in (before, after)
            ]
            assert kernels[0] == kernels[1]
            assert moved[0] == moved[1]


def _profile(module: Any, shape: tuple[int, ...] = (8,)) -> Profile:
    traced = trace(
        model_from_functions(
            module,
            lambda size: {"input": torch.randn(size, *shape)},
            loss_fn=lambda output, _batch: output.square().mean(),
        )
    )
    return with_splits(traced, measure(traced, 4))


class Residual(nn.Module):
    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, inner), nn.Linear(inner, 8)

    def middle(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.middle(self.up(self.norm(x))))


class Sorted(Residual):
    """Sorting over the inner width needs all of it."""

    def middle(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1).values


class Normed(Residual):
    """So does a norm over it."""

    def middle(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])


class Scaled(Residual):
    """A mean over it is a sum that ranks can add up: one number a row."""

    def middle(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)


def _stack(block: Any) -> Any:
    return lambda: nn.Sequential(nn.Linear(8, 8), *(block() for _ in range(3)), nn.Linear(8, 4))


def test_a_column_and_a_row_split_take_one_all_reduce_each_way() -> None:
    found = _profile(_stack(Residual)).layers[2]
    assert found.forward_all_reduce_bytes == (4 * 4 * 8,)
    assert found.backward_all_reduce_bytes == (4 * 4 * 8,)
    assert unsplit_flop(found) == 0
    assert found.split is not None
    # The norm and the bias behind the row split stay whole.
    assert found.split.parameter_bytes == 4 * (8 * 16 + 16 + 16 * 8)
    assert found.split.pieces == 0


@pytest.mark.parametrize("block", [Sorted, Normed])
def test_what_needs_the_whole_width_is_not_split(block: Any) -> None:
    found = _profile(_stack(block)).layers[2]
    assert found.forward_all_reduce_bytes == ()
    assert found.backward_all_reduce_bytes == ()
    assert not any(count.split for count in (*found.forward, *found.backward))


def test_a_sum_over_the_split_width_is_a_small_all_reduce() -> None:
    found = _profile(_stack(Scaled)).layers[2]
    assert sorted(found.forward_all_reduce_bytes) == [4 * 4, 4 * 4 * 8]
    assert unsplit_flop(found) == 0


def test_layers_of_one_product_stay_whole() -> None:
    """Each would have to hand on a split tensor, and none takes one."""
    profile = _profile(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))))
    inner = profile.layers[2]
    assert not any(count.split for count in (*inner.forward, *inner.backward))


def test_peaks_and_saved_bytes_are_shares() -> None:
    found = layer("gpt2", "transformer.h.0")
    assert found.split is not None
    assert 0.5 < found.split.saved_share < 1
    for peaks in (found.split.forward_peaks, found.split.backward_peaks):
        assert math.isclose(max(whole + part for whole, part in peaks), 1.0)
