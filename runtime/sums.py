"""The accumulation buffers of a rank, and views of them.

They stay where they are for as long as the rank lives, so each view is made once. This module knows
memory. It does not know when anything is added up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.shards import UnitState

__all__ = ["GradientSums"]

_Key = tuple[str, str]
"""Unit and buffer."""


class GradientSums:
    """Vectors that units take turns in, each as far as it reaches."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: by buffer name."""
        self.tensors = tensors
        self._totals: dict[_Key, Tensor] = {}
        self._targets: dict[_Key, list[tuple[torch.nn.Parameter, Tensor]]] = {}
        self._pieces: dict[_Key, list[Tensor]] = {}

    def total(self, state: UnitState, buffer: str) -> Tensor:
        """The accumulated gradient of a unit: its length of a buffer."""
        key = state.unit.name, buffer
        if key not in self._totals:
            self._totals[key] = self.tensors[buffer][: state.padded_length]
        return self._totals[key]

    def targets(self, state: UnitState, buffer: str) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """The unit's trained parameters, and where in `total` each one's gradient is added up."""
        key = state.unit.name, buffer
        if key not in self._targets:
            views = state.views(self.total(state, buffer))
            self._targets[key] = [
                (state.parameters[name], view) for name, view in views if name in state.trainable
            ]
        return self._targets[key]

    def piece_views(self, state: UnitState, buffer: str, gradient: Tensor) -> list[Tensor]:
        """What the optimizer's parameters get of this rank's part of a unit's gradient, which may
        be `total` itself or lie anywhere else."""
        key = state.unit.name, buffer
        if self._totals.get(key) is not gradient:
            return state.piece_views(gradient)
        if key not in self._pieces:
            self._pieces[key] = state.piece_views(gradient)
        return self._pieces[key]
