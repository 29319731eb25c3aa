"""Fake copies: a model and a batch with shapes but no storage, on the CPU device.

Fake tensors on "cpu" rather than "meta": factory calls then record a real device, and attention
takes the kernel that a real run takes. Nothing of a model's size is allocated.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from planner.errors import ModelFileError, TraceError
from planner.model_file import ModelFile, raised_at
from planner.trace.constants import RealConstants

__all__ = ["fake_batch", "fake_copy", "fake_like", "fake_run"]


_RESIZED_LOSSES = frozenset({
    torch.ops.aten.mse_loss.default, torch.ops.aten.smooth_l1_loss.default,
    torch.ops.aten.binary_cross_entropy.default, torch.ops.aten.soft_margin_loss.default,
})  # fmt: skip


_FEW_STEPS, _MORE_STEPS = 64, 128
"""Lengths of sequences from which that of a recurrent layer's workspace is known for longer ones.
"""
_Shape = tuple[tuple[int, ...], torch.dtype]


@cache
def _workspace_bytes(shapes: tuple[_Shape, ...], *settings: Any) -> int:
    """What oneDNN's recurrent layer hands to its backward. Only the library knows how much, so it
    runs: on zeros, of few steps, as every further step takes as much as the one before it."""
    (num_steps, *rest), dtype = shapes[0]
    if num_steps > _MORE_STEPS:
        few, more = (
            _workspace_bytes((((steps, *rest), dtype), *shapes[1:]), *settings)
            for steps in (_FEW_STEPS, _MORE_STEPS)
        )
        return more + (more - few) * (num_steps - _MORE_STEPS) // (_MORE_STEPS - _FEW_STEPS)
    with unset_fake_temporarily():
        given = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
        found = torch.ops.aten.mkldnn_rnn_layer.default(*given, *settings)
    return int(found[3].nbytes)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _FakeKernels(RealConstants):
    """Fake kernels for operators whose own reject what their real CPU kernels accept."""

    def run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # torch's fake kernel takes bfloat16 alone; the CPU kernel takes any float.
            halves = [matrix.to(torch.bfloat16) for matrix in args[:2]]
            sizes = func(*halves, *args[2:], **kwargs).size()
            return args[0].new_empty(sizes)
        result = super().run_fake(func, args, kwargs)
        if func is torch.ops.aten.mkldnn_rnn_layer.default and args[-1]:
            shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in args[:7])
            num_bytes = _workspace_bytes(shapes, *map(_hashable, args[7:]))
            return *result[:3], result[3].new_empty(num_bytes)
        if func in _RESIZED_LOSSES and not result.dim():
            # The CPU kernel shrinks a tensor of the inputs' size, whose memory stays.
            whole = torch.broadcast_shapes(args[0].shape, args[1].shape)
            return args[0].new_empty(whole, dtype=result.dtype).resize_(())
        return result


@contextmanager
def fake_run(mode: FakeTensorMode) -> Iterator[None]:
    """Run on fake tensors; torch's generator is as before after it, whatever user code does to it.

    Torch's own log of a failing fake kernel is kept quiet.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with torch.random.fork_rng(devices=[]), mode, _FakeKernels():
            yield
    finally:
        logger.disabled = was_disabled


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same sizes, strides and dtype; call under a FakeTensorMode."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model on fake tensors, in train mode, ties kept; the model is not touched."""
    memo: dict[int, object] = {}
    with mode:
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(
                        fake_like(parameter), requires_grad=parameter.requires_grad
                    )
            others = [*module._buffers.values(), *vars(module).values()]
            for value in others:
                if isinstance(value, torch.Tensor) and id(value) not in memo:
                    memo[id(value)] = fake_like(value)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            hint="keep objects that copy.deepcopy cannot copy out of the modules",
        ) from None
    return copied.train()


def fake_batch(
    model_file: ModelFile, batch_size: int, mode: FakeTensorMode
) -> dict[str, torch.Tensor]:
    """The example batch on fake tensors.

    Raises:
        ModelFileError: `example_batch` fails, or a key is no tensor with `batch_size` rows.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            batch = model_file.example_batch(batch_size)
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"example_batch({batch_size}) raised {type(error).__name__}: {error}{raised_at(error)}",
            hint="correct it: it returns a dict of tensors with batch_size rows each",
        ) from None
    if not isinstance(batch, Mapping) or not batch:
        what = "an empty dict" if isinstance(batch, Mapping) else type(batch).__name__
        raise ModelFileError(
            f"example_batch({batch_size}) returned {what}, not a dict with tensors in it",
            hint="return a dict from the model's keyword arguments to tensors",
        )
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            raise ModelFileError(
                f"example_batch: key {key!r} holds {type(value).__name__}, not a tensor",
                hint="turn it into a tensor, or make it a part of the model",
            )
        if value.dim() == 0 or value.size(0) != batch_size:
            raise ModelFileError(
                f"example_batch({batch_size}): key {key!r} has shape {tuple(value.shape)}; its "
                f"first dimension must be the batch size {batch_size}",
                hint="every tensor of the batch has the batch dimension first",
            )
    with mode:
        return {key: fake_like(value) for key, value in batch.items()}
