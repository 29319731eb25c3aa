"""Flop counted layer by layer is that of the eager model under torch's own counter."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from zoo import PATHS

from planner.measure import measure
from planner.model_file import ModelFile, forward_keys, load_model_file
from planner.trace import trace

SIZE = 2
QUICK = ("checkpointed", "llama", "mixtral", "resnet", "unet")
GROUPED = ("mixtral", "olmoe", "qwen3_moe")
"""They call grouped products."""
CHECKPOINTED_BY_THE_MODEL = {"checkpointed": ("plain.",)}
"""Layers that the model itself, between layers, runs again in backward: for these a plan chooses
whether they are, so a profile has one forward where the eager model has two."""


def _attention(*args: torch.Size, **_: object) -> int:
    return int(sdpa_flop_count(*args[:3]))


def _attention_backward(*args: torch.Size, **_: object) -> int:
    return int(sdpa_backward_flop_count(*args[:4]))


class Grouped:
    """Flop of a grouped product: one matrix product for every group that the routing made."""

    _get_raw = True  # torch's counter then passes tensors in the place of their shapes

    def __init__(self, num_products: int = 1) -> None:
        self.num_products = num_products
        self.total = 0

    def __call__(self, left: Tensor, right: Tensor, ends: Tensor, *_: Any, **__: Any) -> int:
        rows = [end - start for start, end in pairwise([0, *ends.tolist()])]
        if right.dim() == 3:  # each group of rows meets its own matrix
            flop = sum(2 * math.prod((num_rows, *right.shape[1:])) for num_rows in rows)
        else:  # each group of rows makes a matrix
            flop = sum(2 * len(left) * num_rows * right.shape[1] for num_rows in rows)
        self.total += self.num_products * flop
        return self.num_products * flop


def whole_flop(model_file: ModelFile) -> tuple[int, int]:
    """Forward and backward of the eager model, and what of it are grouped products.

    torch lacks formulas for these, and for attention on a CPU.
    """
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._grouped_mm: Grouped(),
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        formulas[torch.ops.transformers.grouped_mm_fallback] = Grouped()
        formulas[torch.ops.transformers.grouped_mm_fallback_backward] = Grouped(num_products=2)
    torch.manual_seed(0)
    model, batch = model_file.build_model().train(), model_file.example_batch(SIZE)
    keys = forward_keys(model, batch)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        if model_file.layers:
            value = next(iter(batch.values()))
            for path in model_file.layers:
                value = model.get_submodule(path)(value)
            output = value
        else:
            output = model(**{key: batch[key] for key in keys})
        loss = output if model_file.loss_fn is None else model_file.loss_fn(output, batch)
        if not isinstance(loss, torch.Tensor):
            loss = loss["loss"]
        loss.backward()
    grouped = sum(f.total for f in formulas.values() if isinstance(f, Grouped))
    return int(counter.get_total_flops()), grouped


def compare(name: str) -> None:
    model_file = load_model_file(str(PATHS[name]))
    layers = measure(trace(model_file), SIZE).layers
    again = CHECKPOINTED_BY_THE_MODEL.get(name, ())
    counted = sum(
        (2 if layer.name.startswith(again) else 1) * layer.forward_flop + layer.backward_flop
        for layer in layers
    )
    whole, grouped = whole_flop(model_file)
    assert counted == whole
    assert (grouped > 0) == (name in GROUPED)


@pytest.mark.parametrize("name", QUICK)
def test_layers_sum_to_the_whole(name: str) -> None:
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PATHS) - set(QUICK)))
def test_layers_of_every_model_sum_to_the_whole(name: str) -> None:
    compare(name)
