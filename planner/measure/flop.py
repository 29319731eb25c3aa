"""Flop of one operator call: torch's formulas, and those that torch lacks.

It knows operators as a `TorchDispatchMode` sees them. It does not know layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_flop"]


def count_flop(
    func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> int:
    """Flop of one call; 0 where it is no matrix product, convolution or attention.

    Causal attention counts in full, as torch's own formulas count it.
    """
    name = str(func)
    if name in _MORE_FORMULAS:
        return _MORE_FORMULAS[name](args, result)
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=result))


def _attention(args: Sequence[Any], _result: Any) -> int:
    query, key, value = (tensor.shape for tensor in args[:3])
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(args: Sequence[Any], _result: Any) -> int:
    gradient, query, key, value = (tensor.shape for tensor in args[:4])
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _grouped_product(args: Sequence[Any], _result: Any) -> int:
    """Rows sorted by group: every row meets one matrix, or every group makes one."""
    left, right = args[0].shape, args[1].shape
    columns = right[-1]
    return int(2 * math.prod(left[-2:]) * columns)


def _grouped_product_backward(args: Sequence[Any], _result: Any) -> int:
    return 2 * _grouped_product(args, None)


_MORE_FORMULAS: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": _attention_backward,
    "aten._grouped_mm.default": _grouped_product,
    "transformers.grouped_mm_fallback.default": _grouped_product,
    "transformers.grouped_mm_fallback_backward.default": _grouped_product_backward,
}
