"""The gather buffers of a rank, which unit each holds, and views of weights that forward saves.

This module knows memory. It does not know when anything happens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.shards import UnitState

__all__ = ["WeightBuffers", "WeightPlace"]


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """A view of gathered weights, wherever the unit lies when it is needed."""

    unit: str
    dtype: torch.dtype
    """Not always the weights' own: a complex view of them counts in pairs."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WeightBuffers:
    """The gather buffers of a rank; none where weights stay in place.

    Forward saves views of gathered weights for backward, but by then the buffer may hold another
    stage, and the stage's weights lie in another buffer. `pack` and `unpack` are saved-tensor hooks
    that keep the place of such a view instead of the view.
    """

    def __init__(self, tensors: Mapping[str, Tensor], states: Mapping[str, UnitState]) -> None:
        """
        Args:
            tensors: by buffer name.
            states: units of this rank.
        """
        self.tensors = tensors
        self._states = states
        self._by_address = {t.untyped_storage().data_ptr(): n for n, t in tensors.items()}
        self._unit_of: dict[str, str] = {}
        """Buffer -> the unit that was gathered into it last."""
        self._in_use: dict[str, str] = {}
        """Unit -> the buffer that the user's parameters are views of."""

    def hold(self, buffer: str, state: UnitState) -> Tensor:
        """The part of a buffer that a unit is gathered into."""
        self._unit_of[buffer] = state.unit.name
        return self.tensors[buffer][: state.padded_length]

    def use(self, buffers: Iterable[str]) -> None:
        """The user's parameters become views of these buffers (others are passed over)."""
        for buffer in buffers:
            if buffer not in self.tensors:
                continue
            unit = self._unit_of[buffer]
            if self._in_use.get(unit) != buffer:
                self._states[unit].attach_weights(self.tensors[buffer])
                self._in_use[unit] = buffer

    def release(self, buffer: str) -> None:
        """The buffer holds nothing any more."""
        unit = self._unit_of.pop(buffer, "")
        if self._in_use.get(unit) == buffer:
            del self._in_use[unit]
            self._states[unit].detach_weights()

    def apart(self, tensor: Tensor) -> Tensor:
        """A stage's output, copied if it is a view of weights that another unit may replace."""
        if self._by_address and tensor.untyped_storage().data_ptr() in self._by_address:
            return tensor.clone()
        return tensor

    def pack(self, tensor: Tensor) -> "Tensor | WeightPlace":
        buffer = self._by_address.get(tensor.untyped_storage().data_ptr())
        if buffer is None or tensor.numel() == 0:
            return tensor
        if tensor.is_conj() or tensor.is_neg():
            return tensor.resolve_conj().resolve_neg()
        return WeightPlace(
            self._unit_of[buffer],
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
        )

    def unpack(self, packed: "Tensor | WeightPlace") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        whole = self.tensors[self._in_use[packed.unit]]
        place = torch.empty(0, dtype=packed.dtype, device=whole.device)
        return place.set_(whole.untyped_storage(), packed.offset, packed.shape, packed.stride)
