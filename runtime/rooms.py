"""Room in host memory that copies take turns in.

Pinned memory takes long to make, and making it can stop the device, so what one copy leaves is
taken by the next of the same shape. This module knows memory. It does not know what is in it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from runtime.layout import dense_stride
from runtime.transport import Pending

__all__ = ["HostCopy", "Rooms", "over_copies", "over_tensors"]

Make = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype, bool], Tensor]
"""Shape, strides, type, and whether it must be pinned -> room."""


@dataclass(slots=True, eq=False)
class HostCopy:
    """A tensor in host memory."""

    tensor: Tensor
    device: torch.device
    """Where it is from, and goes back to: optimizers keep some figures on the CPU."""
    reader: Pending | None = None
    """The last copy of it back to the device, which may still be under way."""


class Rooms:
    """Free rooms by shape."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._free: dict[Any, list[HostCopy]] = {}

    def take(self, tensor: Tensor, device: torch.device | None = None) -> HostCopy:
        """For a copy of `tensor`; `reader` is who may still read what was in it.

        It goes back to `device`: where the tensor is, if not said.
        """
        device = device or tensor.device
        shape, strides = tuple(tensor.shape), dense_stride(tuple(tensor.shape), tensor.stride())
        key = shape, strides, tensor.dtype, device
        try:  # the thread of updates takes rooms as well: asking first would be another moment
            return self._free[key].pop()
        except (KeyError, IndexError):
            room = self._make(shape, strides, tensor.dtype, device.type == "cuda")
            return HostCopy(room, device)

    def give_back(self, copies: Iterable[HostCopy]) -> None:
        """Nobody needs what is in them."""
        for copy in copies:
            tensor = copy.tensor
            key = tuple(tensor.shape), tensor.stride(), tensor.dtype, copy.device
            self._free.setdefault(key, []).append(copy)


def over_copies(function: Callable[[HostCopy], Any], value: Any) -> Any:
    """The value with `function` of each copy inside it."""
    return pytree.tree_map_only(HostCopy, function, value)


def over_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with `function` of each tensor inside it."""
    return pytree.tree_map_only(Tensor, function, value)
