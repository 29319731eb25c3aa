"""A range of a tensor's elements as boxes of the tensor: what a checkpoint is written in.

A replica owns a range of elements, which may begin and end in the middle of a row. Checkpoints, and
any other layout of the same model, know boxes: an offset and a size in every dimension. This module
knows shapes and strides only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Box", "Key", "Part"]

Key = tuple[str, ...]
"""Words of a tensor's name; joined by dots in the checkpoint."""


class Box(NamedTuple):
    """A part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    values: Tensor
    """Of that shape: a view of the range's elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive elements of a tensor, to be written or to be filled."""

    key: Key
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Dense."""
    values: Tensor
    """The elements in memory order, as one vector."""
    first: int = 0
    """Place of the first of them."""

    @property
    def name(self) -> str:
        return ".".join(self.key)

    def boxes(self) -> list[Box]:
        return list(_boxes_of(self.shape, self.stride, self.first, self.values))


def _boxes_of(
    shape: Sequence[int], stride: Sequence[int], first: int, values: Tensor
) -> Iterator[Box]:
    """The boxes that hold elements `first` and on of a dense tensor, in memory order.

    Args:
        shape: of the tensor.
        stride: of the tensor, dense in whatever order of dimensions.
        first: place in memory order of the first element.
        values: the elements, as one vector; the boxes' values are views of it.
    """
    order = sorted(range(len(shape)), key=lambda dim: (-stride[dim], dim))
    places = [order.index(dim) for dim in range(len(shape))]
    in_order = [shape[dim] for dim in order]
    position = 0
    for offsets, sizes in _ranges(in_order, first, first + values.numel()):
        length = math.prod(sizes)
        part = values[position : position + length].view(sizes).permute(places)
        position += length
        yield Box(tuple(offsets[p] for p in places), tuple(sizes[p] for p in places), part)


def _ranges(shape: list[int], first: int, last: int) -> Iterator[tuple[list[int], list[int]]]:
    """(offsets, sizes) of contiguous boxes, in order: a part of a row, whole rows, a part of one.

    Of a single element or whole rows there are fewer; parts of rows are cut in the same way.
    """
    if first >= last:
        return
    if not shape:
        yield [], []
        return
    inner = math.prod(shape[1:])
    (row, start), (end, rest) = divmod(first, inner), divmod(last, inner)
    if start:
        stop = rest if row == end else inner
        for offsets, sizes in _ranges(shape[1:], start, stop):
            yield [row, *offsets], [1, *sizes]
        if row == end:
            return
        row += 1
    if row < end:
        yield [row, *[0] * (len(shape) - 1)], [end - row, *shape[1:]]
    for offsets, sizes in _ranges(shape[1:], 0, rest):
        yield [end, *offsets], [1, *sizes]
