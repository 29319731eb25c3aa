"""How the elements of a tensor lie in memory, and how they travel.

Kernels choose their order of additions by the layout of what they are given, so a tensor arrives
with the layout that it had where it was made. This module knows shapes and strides only.
"""

from functools import cache

import torch
from torch import Tensor

from planner.graph import TensorSpec

__all__ = ["dense_stride", "empty", "flat", "is_contiguous", "is_dense", "with_traced_layout"]


@cache  # asked of every tensor that travels, of the same few layouts in every step
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill one range of memory, each place once, in whatever order."""
    dense = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != dense:
            return False
        dense *= size
    return True


@cache
def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """As torch says it of a tensor with this layout."""
    return torch.empty_strided(shape, stride, device="meta").is_contiguous()


@cache
def dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The same layout where it is dense; with gaps or overlaps, the contiguous one."""
    if is_dense(shape, stride):
        return tuple(stride)
    strides = []
    contiguous = 1
    for size in reversed(shape):
        strides.append(contiguous)
        contiguous *= size
    return tuple(reversed(strides))


def empty(spec: TensorSpec, device: torch.device) -> Tensor:
    """A tensor to receive `spec` into: dense."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    stride = dense_stride(spec.shape, spec.stride)
    return torch.empty_strided(spec.shape, stride, dtype=dtype, device=device)


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, as one vector, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def with_traced_layout(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """A tensor that travelled densely, with the gaps or the expanded dimensions of its trace.

    Layouts that overlap in any other way (sliding windows) stay contiguous.
    """
    if is_dense(spec.shape, spec.stride) or tensor.stride() == spec.stride:
        return tensor
    once = [1 if step == 0 else size for size, step in zip(spec.shape, spec.stride, strict=True)]
    reach = 1
    for step, size in sorted(zip(spec.stride, once, strict=True)):
        if size > 1 and step < reach:
            return tensor
        reach = max(reach, step * size)
    index = tuple(slice(0, size) for size in once)
    laid = torch.empty_strided(once, spec.stride, dtype=tensor.dtype, device=tensor.device)
    return laid.copy_(tensor[index]).expand(spec.shape)
