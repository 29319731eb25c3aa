"""Choose which classes of axes tensor parallelism splits, and count what that costs.

A class can be split if no operator needs one of its axes whole, no tensor would be split twice, and
a parameter is split with it. Classes are taken greedily: the one that divides the most flop not
divided yet for each byte of the all-reduces that it adds. A sum over a split
axis leaves each rank with a part of the result; parts go through linear operators as they are, and
are all-reduced where the first other operator needs them. This module knows axes and operators'
effects on them. It does not know which operators those were.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from planner.measure.axes import Axes
from planner.measure.split_call import Value
from planner.profile import OperatorCount

__all__ = ["Choice", "Operation"]

_Groups = frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operator that ran. Inputs and outputs are indices of values, constants left out."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    count: OperatorCount | None
    """Of one kernel; None where it launches none."""
    summed: tuple[int, ...]
    """Axes that it sums over."""
    small: tuple[tuple[tuple[int, ...], int], ...]
    """Axes that it needs a little of from every rank, and the bytes of that."""
    is_linear: bool
    is_product: bool
    """Linear in each input alone."""
    is_backward: bool


@dataclass(slots=True, kw_only=True)
class Choice:
    """Everything that one layer does to its axes."""

    axes: Axes
    values: Sequence[Value]
    operations: Sequence[Operation]
    parameters: Sequence[int]
    """Values of parameters."""
    sums: set[int]
    """Values that add up gradients of parameters: parts are added to them as they are, as their
    own all-reduce is needed once per step."""
    outputs: set[int]
    """Values that must be complete in the end."""
    groups_of: list[_Groups] = field(init=False)
    """Per value: the classes of its axes."""
    _touched: list[_Groups] = field(init=False)
    """Per operation: the classes of the axes of all its tensors."""
    _unread: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.groups_of = [self._groups(value.axes) for value in self.values]
        self._touched = [
            frozenset().union(*(self.groups_of[i] for i in (*op.inputs, *op.outputs)))
            for op in self.operations
        ]
        read = {index for op in self.operations for index in op.inputs}
        self._unread = {i for op in self.operations for i in op.outputs if i not in read}

    def best(self) -> _Groups:
        """The classes to split."""
        twice, together = self._conflicts()
        candidates = {
            group
            for index in self.parameters
            for group in self.groups_of[index]
            if not self.axes.is_whole(group) and group not in twice
        }
        chosen: _Groups = frozenset()
        known_bytes = 0
        while candidates:
            ranked = []
            for group in sorted(candidates):
                more = chosen | {group}
                added = sum(map(sum, self.all_reduces(more))) - known_bytes
                flop = self._more_flop(group, chosen)
                ranked.append((-flop / max(1, added), -flop, added, group))
            _, less_flop, added, group = min(ranked)
            candidates.discard(group)
            # What divides no flop is split to hold less of it, if that is more than it costs.
            if less_flop < 0 or added < self._parameter_bytes(group):
                chosen |= {group}
                known_bytes += added
                candidates -= together.get(group, set())
        return chosen

    def all_reduces(self, chosen: _Groups) -> tuple[list[int], list[int]]:
        """Bytes of each all-reduce of forward and of backward."""
        found: tuple[list[int], list[int]] = ([], [])
        part_of: dict[int, frozenset[int]] = {}
        """Value that is a part of sums -> the operations that made those, through linear ones."""
        complete: set[frozenset[int]] = set()
        sums = set(self.sums)

        def reduce(index: int, is_backward: bool) -> None:
            origins = part_of.pop(index)
            if origins not in complete and not all(frozenset({o}) in complete for o in origins):
                complete.add(origins)
                found[is_backward].append(self.values[index].num_bytes)

        is_backward = False
        for number, op in enumerate(self.operations):
            if op.is_backward and not is_backward:
                is_backward = True
                for index in [i for i in part_of if i in self.outputs]:
                    reduce(index, False)
            parts = [i for i in op.inputs if i in part_of]
            if sums.intersection(op.inputs):
                sums.update(op.outputs)
                continue
            origins: frozenset[int] = frozenset()
            if parts and self._passes(op, parts):
                # What is whole joins a sum on one of the ranks, and scales it on all of them.
                origins = frozenset().union(*(part_of[i] for i in parts))
                if op.is_product or self._shrinks(parts, op.outputs):
                    origins = frozenset({number})
            else:
                for index in dict.fromkeys(parts):
                    reduce(index, op.is_backward)
            for axes, num_bytes in op.small:
                if chosen & self._groups(axes):
                    found[op.is_backward].append(num_bytes)
            if chosen & self._groups(op.summed):
                origins |= {number}
            if origins:
                part_of.update(dict.fromkeys(op.outputs, origins))
        for index in [i for i in part_of if i in self._unread | self.outputs]:
            reduce(index, is_backward)
        return found

    def counts(
        self, chosen: _Groups
    ) -> tuple[tuple[OperatorCount, ...], tuple[OperatorCount, ...]]:
        """Kernels of forward and of backward, equal ones together, in order of appearance."""
        found: tuple[Counter[OperatorCount], Counter[OperatorCount]] = (Counter(), Counter())
        for op, touched in zip(self.operations, self._touched, strict=True):
            if op.count is not None:
                found[op.is_backward][replace(op.count, split=bool(touched & chosen))] += 1
        forward, backward = (
            tuple(replace(count, num_kernels=number) for count, number in counter.items())
            for counter in found
        )
        return forward, backward

    def split_dim(self, value: Value, chosen: _Groups) -> int | None:
        """The dimension in which a value is split."""
        for index, dim in enumerate(value.dims or ()):
            if self._groups(dim) & chosen:
                return index
        return None

    def pieces(self, chosen: _Groups) -> int:
        """What degrees must divide: the common divisor of sizes that are worked on in pieces."""
        leaves = {a for value in self.values for a in self.axes.leaves(value.axes)}
        pieces = [a for a in leaves if self.axes.group(a) in chosen and self.axes.is_piece(a)]
        return math.gcd(*(self.axes.size(axis) for axis in pieces)) if pieces else 0

    def _passes(self, op: Operation, parts: Sequence[int]) -> bool:
        """Whether parts of sums come out as a part, and not a larger one for no reason."""
        if op.is_linear:
            return True
        sizes = [sum(self.values[i].num_bytes for i in some) for some in (op.outputs, parts)]
        return op.is_product and len(parts) == 1 and sizes[0] <= sizes[1]

    def _shrinks(self, parts: Sequence[int], outputs: Sequence[int]) -> bool:
        """Whether what comes out does not say what went in."""
        return any(
            math.prod(self.values[out].shape) < math.prod(self.values[part].shape)
            for out in outputs
            for part in parts
        )

    def _groups(self, axes: Iterable[int]) -> _Groups:
        return frozenset(self.axes.group(axis) for axis in self.axes.leaves(axes))

    def _conflicts(self) -> tuple[set[int], dict[int, set[int]]]:
        """Classes that some tensor has twice, and for each class those that share a tensor."""
        twice: set[int] = set()
        together: dict[int, set[int]] = {}
        for value, groups in zip(self.values, self.groups_of, strict=True):
            if len(groups) < len(self.axes.leaves(value.axes)):
                counted = Counter(self.axes.group(a) for a in self.axes.leaves(value.axes))
                twice |= {group for group, number in counted.items() if number > 1}
            for group in groups:
                together.setdefault(group, set()).update(groups - {group})
        return twice, together

    def _more_flop(self, group: int, chosen: _Groups) -> int:
        """Flop that a class divides and those chosen already do not."""
        return sum(
            op.count.flop
            for op, touched in zip(self.operations, self._touched, strict=True)
            if op.count is not None and group in touched and not touched & chosen
        )

    def _parameter_bytes(self, group: int) -> int:
        return sum(
            self.values[index].num_bytes
            for index in self.parameters
            if group in self.groups_of[index]
        )
