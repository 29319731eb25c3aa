"""A model turned into the type it computes in, but for the modules that stay in float32.

A pattern names parameters or buffers (`*.norm.*`, shell's wildcards). A module that owns one of
them, or shares one, stays in float32 with all that it owns itself; floating tensors that it is
called with are cast to float32, and those that it returns to the compute type. The planner traces
such a model and the runtime trains it, so both ask here. This module knows modules. It does not
know masters.
"""

import fnmatch
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planner.errors import UsageError
from planner.precision import Precision

__all__ = ["cast_tensor", "to_compute_type"]


def cast_tensor(tensor: Tensor, precision: Precision) -> Tensor:
    """A floating tensor in the compute type; others, and those of that type, as they are."""
    if precision.compute_dtype is None:
        return tensor
    return _cast(tensor, getattr(torch, precision.compute_dtype))


def to_compute_type(
    model: nn.Module,
    precision: Precision,
    keep_float32: Sequence[str] = (),
    *,
    done: Collection[int] = (),
) -> nn.Module:
    """Turn the model itself into its compute type, but for parameters whose id() is in `done`.

    Without mixed precision it stays as it is.

    Raises:
        UsageError: a pattern matches no floating parameter or buffer.
    """
    if precision.compute_dtype is None:
        return model
    compute = getattr(torch, precision.compute_dtype)
    kept = _kept_modules(model, keep_float32)
    for module in model.modules():
        dtype = torch.float32 if id(module) in kept else compute
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in done:
                parameter.data = _cast(parameter.data, dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _cast(buffer, dtype)
        if id(module) in kept:
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(functools.partial(_cast_outputs, compute))
    return model


def _kept_modules(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    """id() of modules that own a tensor that a pattern matches, or share one with one of them."""
    owners: dict[int, list[nn.Module]] = {}
    named: list[tuple[str, int]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point():
                owners.setdefault(id(tensor), []).append(module)
                named.append((f"{path}.{name}" if path else name, id(tensor)))
    waiting = []
    for pattern in patterns:
        matched = [key for name, key in named if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            names = ", ".join(name for name, _ in named[:3])
            raise UsageError(
                f"{pattern!r} is to stay in float32, but no parameter or buffer is named so",
                hint=f"use names such as {names}, with * for any part" if names else "",
            )
        waiting += matched
    kept: set[int] = set()
    while waiting:
        for module in owners[waiting.pop()]:
            if id(module) not in kept:
                kept.add(id(module))
                own = (*module._parameters.values(), *module._buffers.values())
                waiting += [id(tensor) for tensor in own if id(tensor) in owners]
    return kept


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _cast_inputs(_: nn.Module, arguments: Any, keywords: Any) -> Any:
    return _all_cast((arguments, keywords), torch.float32)


def _cast_outputs(dtype: torch.dtype, _: nn.Module, __: Any, output: Any) -> Any:
    return _all_cast(output, dtype)


def _all_cast(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), value)
