"""Tensors that a graph saves for backward, where the plan moves them to host memory in between.

The graph holds places instead of tensors: a boundary tensor's place is the buffer of its name, so
that it leaves the device when that buffer does; what the stage saves for itself is held here, and
leaves and comes back as a whole. Used only where a plan evicts such buffers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.layout import is_dense
from runtime.weights import WeightBuffers

__all__ = ["SavedTensors"]


@dataclass(slots=True)
class _View:
    """A saved tensor: its place in a storage."""

    box: "_Box"
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Box:
    """One storage that saved tensors look at."""

    storage: torch.UntypedStorage | None
    """None: it belongs to a buffer, or is not on the device."""
    views: list[_View] = field(default_factory=list)
    buffer: str = ""
    """The buffer it belongs to, if any."""
    first: int = 0
    """Where that buffer's tensor began in it, in elements."""


class SavedTensors:
    """What one FORWARD or RECOMPUTE saves. `pack` and `unpack` are its saved-tensor hooks."""

    def __init__(self, weights: WeightBuffers, buffer: Callable[[str], Tensor]) -> None:
        """
        Args:
            weights: whose views are packed in their own way.
            buffer: name -> what that buffer holds at present.
        """
        self._weights = weights
        self._buffer = buffer
        self._boxes: dict[int, _Box] = {}
        self._own: list[_Box] = []
        self._device = torch.device("cpu")

    def pack(self, tensor: Tensor) -> Any:
        packed = self._weights.pack(tensor)
        if not isinstance(packed, Tensor) or packed.layout != torch.strided or not packed.numel():
            return packed
        tensor = packed.resolve_conj().resolve_neg()
        storage = tensor.untyped_storage()
        box = self._boxes.setdefault(storage.data_ptr(), _Box(storage))
        offset = int(tensor.storage_offset())
        view = _View(box, tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)
        box.views.append(view)
        self._device = tensor.device
        return view

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            return self._weights.unpack(packed)
        box, offset = packed.box, packed.offset
        storage = box.storage
        if box.buffer:
            tensor = self._buffer(box.buffer)
            storage = tensor.untyped_storage()
            offset += int(tensor.storage_offset()) - box.first
        assert storage is not None, "what the stage saved is in host memory"
        place = torch.empty(0, dtype=packed.dtype, device=self._device)
        return place.set_(storage, offset, packed.shape, packed.stride)

    def give_to(self, buffer: str, tensor: Tensor) -> None:
        """From now on saved views of `tensor` are views of whatever `buffer` holds.

        Not where a view reaches beyond it, or it lies in memory with gaps: a copy has none.
        """
        box = self._boxes.get(tensor.untyped_storage().data_ptr())
        if box is None or not is_dense(tuple(tensor.shape), tensor.stride()):
            return
        first = int(tensor.storage_offset())
        last = first + tensor.numel()
        if all(
            view.dtype == tensor.dtype and first <= view.offset and _end(view) <= last
            for view in box.views
        ):
            box.storage, box.buffer, box.first = None, buffer, first

    def keep(self, foreign: Iterable[Tensor]) -> None:
        """What is saved, except views of `foreign` and of buffers, is this object's own."""
        others = {tensor.untyped_storage().data_ptr() for tensor in foreign}
        self._own = [
            box for at, box in self._boxes.items() if at not in others and box.storage is not None
        ]

    def end_forward(self) -> None:
        """Nothing more is saved, nor given to buffers."""
        for box in self._boxes.values():
            box.views.clear()  # or boxes and views would keep each other alive
        self._boxes = {}

    def tensors(self) -> list[Tensor]:
        """The bytes of its own."""
        found = []
        for box in self._own:
            assert box.storage is not None
            room = torch.empty(0, dtype=torch.uint8, device=self._device)
            found.append(room.set_(box.storage))
        return found

    def put(self, tensors: Sequence[Tensor] | None) -> None:
        """Bytes that `tensors` gave, back on the device; None: they leave it."""
        for index, box in enumerate(self._own):
            box.storage = None if tensors is None else tensors[index].untyped_storage()


def _end(view: _View) -> int:
    """The first element behind a view."""
    return (
        view.offset
        + 1
        + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    )
