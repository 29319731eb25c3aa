"""Axes of tensors, and which of them are one: through views, products and element-wise operators.

A dimension is a list of axes, the outermost first; an axis is divided where a view divides its
dimension. Axes that are one are united; axes that are only split together (the parts of a fused
projection) are tied. An axis that some operator needs in one piece is whole, and so is all that is
tied to it. This module knows sizes. It does not know operators or ranks.
"""

from collections.abc import Iterable, Sequence

__all__ = ["Axes", "Dim"]

Dim = list[int]
"""Axes of one dimension, outermost first; empty for a dimension of size 1."""


class Axes:
    """Every axis met so far. An axis is a number."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: dict[int, list[int]] = {}
        """Of a divided axis: its parts, outermost first."""
        self._group: list[int] = []
        self._whole_axes: set[int] = set()
        self._whole_groups: set[int] = set()
        self._pieces: set[int] = set()

    def new(self, size: int) -> Dim:
        """A dimension of its own."""
        if size == 1:
            return []
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._group.append(len(self._group))
        return [len(self._parent) - 1]

    def size(self, axis: int) -> int:
        return self._size[self._find(axis)]

    def leaves(self, dim: Iterable[int]) -> Dim:
        """The undivided axes that a dimension consists of."""
        found: Dim = []
        for axis in dim:
            root = self._find(axis)
            if root in self._parts:
                found += self.leaves(self._parts[root])
            else:
                found.append(root)
        return found

    def group(self, axis: int) -> int:
        """What stands for all axes that are split together with an undivided one."""
        return self._find_group(self._find(axis))

    def is_whole(self, group: int) -> bool:
        return self._find_group(group) in self._whole_groups

    def is_piece(self, axis: int) -> bool:
        """Whether something works on pieces of it: it is the outer part of a divided dimension."""
        return self._find(axis) in self._pieces

    def keep_whole(self, dim: Iterable[int]) -> None:
        """No rank may hold less than all of these axes."""
        for axis in self.leaves(dim):
            self._whole_axes.add(axis)
            self._whole_groups.add(self._find_group(axis))

    def tie(self, one: Dim, other: Dim) -> None:
        """Dimensions that can only be split together, outermost axis with outermost axis."""
        first, second = self.leaves(one), self.leaves(other)
        if not first or not second:
            self.keep_whole(first + second)
            return
        self._tie(first[0], second[0])
        self.keep_whole(first[1:] + second[1:])

    def unite(self, one: Dim, other: Dim) -> None:
        """Dimensions of equal size that are one."""
        ours, theirs = self.leaves(one)[::-1], self.leaves(other)[::-1]
        while ours and theirs:
            a, b = self._pop(ours), self._pop(theirs)
            if a == b:
                continue
            larger, smaller = (a, b) if self._size[a] > self._size[b] else (b, a)
            if self._size[larger] % self._size[smaller]:
                self.keep_whole([a, b, *ours, *theirs])
                return
            if self._size[larger] > self._size[smaller]:
                outer, inner = self._divide(larger, self._size[smaller])
                (ours if larger == a else theirs).append(inner)
                larger = outer
            self._unite(larger, smaller)
        self.keep_whole([*ours, *theirs])

    def regroup(self, dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
        """The dimensions of a view with another shape."""
        left = self.leaves(axis for dim in dims for axis in dim)[::-1]
        found: list[Dim] = []
        for size in shape:
            dim: Dim = []
            missing = size
            while missing > 1 and left:
                axis = self._pop(left)
                has = self._size[axis]
                if has > missing and has % missing == 0:
                    axis, inner = self._divide(axis, missing)
                    left.append(inner)
                elif missing % has:
                    self.keep_whole([axis, *left, *dim, *(a for d in found for a in d)])
                    return [self._whole(size) for size in shape]
                dim.append(axis)
                missing //= self._size[axis]
            found.append(dim)
        return found

    def _whole(self, size: int) -> Dim:
        dim = self.new(size)
        self.keep_whole(dim)
        return dim

    def _pop(self, stack: Dim) -> int:
        """The next undivided axis: what waits may have been divided or united since."""
        first, *others = self.leaves([stack.pop()])
        stack += others[::-1]
        return first

    def _find(self, axis: int) -> int:
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def _find_group(self, axis: int) -> int:
        while self._group[axis] != axis:
            self._group[axis] = self._group[self._group[axis]]
            axis = self._group[axis]
        return axis

    def _tie(self, one: int, other: int) -> None:
        a, b = self._find_group(one), self._find_group(other)
        if a == b:
            return
        self._group[b] = a
        if b in self._whole_groups:
            self._whole_groups.add(a)

    def _divide(self, axis: int, outer_size: int) -> tuple[int, int]:
        """An undivided axis into an outer and an inner part. The outer one keeps its ties."""
        (outer,), (inner,) = self.new(outer_size), self.new(self._size[axis] // outer_size)
        self._parts[axis] = [outer, inner]
        self._pieces.add(outer)
        self._tie(axis, outer)
        if axis in self._whole_axes:
            self.keep_whole([outer, inner])
        return outer, inner

    def _unite(self, one: int, other: int) -> None:
        """Two undivided axes of one size."""
        a, b = self._find(one), self._find(other)
        if a == b:
            return
        self._tie(a, b)
        self._parent[b] = a
        if b in self._whole_axes:
            self._whole_axes.add(a)
        if b in self._pieces:
            self._pieces.add(a)
