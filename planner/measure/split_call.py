"""One call of an operator, with its tensors' axes: what rules of tensor parallelism work on.

This module knows tensors as dimensions of axes. It does not know operators.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from planner.measure.axes import Axes, Dim

__all__ = ["Call", "Value"]


@dataclass(slots=True, eq=False)
class Value:
    """A tensor as some operator left it."""

    shape: tuple[int, ...]
    num_bytes: int
    dims: list[Dim] | None
    """None for constants (masks, positions, indices): every rank has them, and takes what it
    needs."""
    storage: int = 0
    origin: int = -1
    """Index of the operator that made the sum that this is, through views and casts."""

    def dim(self, index: int) -> Dim:
        return [] if self.dims is None else self.dims[index]

    @property
    def axes(self) -> list[int]:
        return [axis for dim in self.dims or () for axis in dim]


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of an operator, its tensors as values."""

    name: str
    args: tuple[Any, ...]
    """Tensors replaced by values."""
    kwargs: dict[str, Any]
    outputs: list[Value]
    axes: Axes
    summed: list[int] = field(default_factory=list)
    """Axes that it sums over."""
    small: list[tuple[list[int], int]] = field(default_factory=list)
    """Axes that it needs a little of from every rank, and the bytes of that."""
    is_linear: bool = False
    """Parts of sums go through it, and come out as a part of the result."""
    is_product: bool = False
    """One such part goes through it, if everything else is whole."""

    @property
    def live(self) -> list[Value]:
        """Tensors it reads that are no constants."""
        return [value for value in _values((self.args, self.kwargs)) if value.dims is not None]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def same(self, one: Value, one_index: int, other: Value, other_index: int) -> None:
        """Two dimensions are one, if neither tensor is a constant or broadcast along it."""
        if one.dims is None or other.dims is None:
            return
        if one.shape[one_index] == other.shape[other_index]:
            self.axes.unite(one.dims[one_index], other.dims[other_index])
        elif 1 not in (one.shape[one_index], other.shape[other_index]):
            self.axes.keep_whole(one.dims[one_index] + other.dims[other_index])

    def like(self, one: Value, other: Value, but: Iterable[int] = ()) -> None:
        """Dimensions are one, aligned at the last one as in broadcasting, but for some of `one`."""
        skipped = {index % len(one.shape) for index in but} if one.shape else set()
        for back in range(1, min(len(one.shape), len(other.shape)) + 1):
            if len(one.shape) - back not in skipped:
                self.same(one, len(one.shape) - back, other, len(other.shape) - back)

    def whole(self, value: Value, *indices: int) -> None:
        for index in indices:
            self.axes.keep_whole(value.dim(index))

    def product(self, left: Value, right: Value, out: Value) -> None:
        """out[.., i, j] = sum over k of left[.., i, k] right[.., k, j]."""
        self.same(left, len(left.shape) - 1, right, len(right.shape) - 2)
        self.summed += left.dim(-1) or right.dim(-2)
        self.same(left, len(left.shape) - 2, out, len(out.shape) - 2)
        self.same(right, len(right.shape) - 1, out, len(out.shape) - 1)
        for index in range(len(out.shape) - 2):
            self.same(left, index, out, index)
            self.same(right, index, out, index)


def _values(tree: Any) -> Iterable[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _values(item)
    elif isinstance(tree, dict):
        yield from _values(list(tree.values()))
