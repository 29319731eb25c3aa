"""Figures of a stage as tables over its two cuts, so that any stage is a sum of two look-ups.

A stage [first, end) takes prefix[end] - prefix[first] + entry[first] + leave[end] of whatever a
table counts. This module knows arithmetic. It does not know what is counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add, sub

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cuts", "Table", "least", "prefix_of"]

Cuts = NDArray[np.int64]
"""Boundaries of a split, or of many, a row each."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Whole numbers over the cuts of a model, num_layers + 1 of each."""

    prefix: tuple[int, ...]
    """Of the layers before each cut."""
    entry: tuple[int, ...]
    """More for a stage that begins there."""
    leave: tuple[int, ...]
    """More for a stage that ends there."""

    @cached_property
    def begins(self) -> list[int]:
        """What the first cut of a stage adds, prefix and all."""
        return list(map(sub, self.entry, self.prefix))

    @cached_property
    def ends(self) -> list[int]:
        """What its end adds."""
        return list(map(add, self.leave, self.prefix))

    @cached_property
    def arrays(self) -> tuple[Cuts, Cuts]:
        """`begins` and `ends` as arrays."""
        return np.array(self.begins, dtype=np.int64), np.array(self.ends, dtype=np.int64)

    @classmethod
    def of(
        cls,
        layers: Sequence[int],
        *,
        entry: Sequence[int] | int = 0,
        leave: Sequence[int] | int = 0,
    ) -> "Table":
        """From what each layer adds; a number at the cuts stands for all of them."""
        cuts = len(layers) + 1
        return cls(
            prefix=prefix_of(layers),
            entry=(entry,) * cuts if isinstance(entry, int) else tuple(entry),
            leave=(leave,) * cuts if isinstance(leave, int) else tuple(leave),
        )

    def at(self, first: int, end: int) -> int:
        """Of the stage between two cuts."""
        return self.begins[first] + self.ends[end]

    def of_all(self, cuts: Cuts) -> Cuts:
        """Of the stages between each two neighbours along the last axis of an array of cuts."""
        begins, ends = self.arrays
        found: Cuts = begins[cuts[..., :-1]] + ends[cuts[..., 1:]]
        return found

    @property
    def layers(self) -> tuple[int, ...]:
        """What each layer adds."""
        return tuple(end - first for first, end in itertools.pairwise(self.prefix))

    @cached_property
    def is_zero(self) -> bool:
        return not (self.prefix[-1] or any(self.entry) or any(self.leave))


def prefix_of(layers: Iterable[int]) -> tuple[int, ...]:
    """Sums of the first 0, 1, ... layers."""
    return tuple(itertools.accumulate(layers, initial=0))


def least(tables: Sequence[Table]) -> Table:
    """A table below all of them: the least of each layer, entry and exit."""
    if len(tables) == 1:
        return tables[0]
    return Table.of(
        [min(row) for row in zip(*(table.layers for table in tables), strict=True)],
        entry=[min(row) for row in zip(*(table.entry for table in tables), strict=True)],
        leave=[min(row) for row in zip(*(table.leave for table in tables), strict=True)],
    )
