"""Parameters of a rank as flat vectors: weights, gradients, and this replica's part of them.

A unit's parameters lie one after another in one flat vector. The user's parameters become views of
it, so the user's modules compute on it directly. With partition 3 each replica owns one equal part
(padded) of the vector; the whole exists only in a gather buffer, while a stage needs it.

This module knows memory and names. It does not know when anything happens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.plan.types import Plan, Unit
from runtime.layout import dense_stride, flat

__all__ = ["Piece", "UnitState", "WeightBuffers"]

_ALIGNMENT_BYTES = 64
"""Where torch's allocator starts tensors; kernels may choose their instructions by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of one parameter that one replica owns."""

    name: str
    parameter: torch.nn.Parameter
    """What the optimizer sees: the user's own parameter where the whole of it is here."""
    first: int
    last: int
    """Range in the unit's flat vector (padded, all replicas)."""


class UnitState:
    """One unit on one rank."""

    def __init__(self, unit: Unit, plan: Plan, model: torch.nn.Module, replica: int) -> None:
        """Copy the unit's parameters out of the freshly built model into its flat vector."""
        self.unit = unit
        specs = {spec.name: spec for spec in plan.parameters}
        self.trainable = {name for name in unit.parameters if specs[name].trainable}
        self.parameters = {name: model.get_parameter(name) for name in unit.parameters}
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        self.strides = {
            name: dense_stride(p.shape, p.stride()) for name, p in self.parameters.items()
        }
        self.partitioned = plan.partition == 3
        self.ranges, length = self._ranges()
        parts = plan.num_replicas
        self.part_length = math.ceil(length / parts)
        self.padded_length = self.part_length * parts if self.partitioned else length
        example = next(iter(self.parameters.values()))
        whole = example.detach().new_zeros(self.padded_length)
        for name, view in self.views(whole):
            view.copy_(self.parameters[name].detach())
        if self.partitioned:
            start = replica * self.part_length
            self.shard = whole[start : start + self.part_length].clone()
            self.first, self.last = start, start + self.part_length
        else:
            self.shard = whole
            self.first, self.last = 0, length
            self.attach_weights(whole)
        self.pieces = tuple(self._pieces())

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view in the parameter's shape) of each parameter in a whole flat vector."""
        for name, (first, last) in self.ranges.items():
            part = flat[first:last]
            yield name, part.as_strided(self.shapes[name], self.strides[name])

    def in_flat_order(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor like the parameter as one vector: its elements as they lie in the unit's."""
        laid = torch.empty_strided(
            self.shapes[name], self.strides[name], dtype=tensor.dtype, device=tensor.device
        )
        return flat(laid.copy_(tensor))

    def attach_weights(self, flat: Tensor) -> None:
        """The user's parameters become views of `flat` (at least the unpadded length)."""
        for name, view in self.views(flat):
            self.parameters[name].data = view

    def detach_weights(self) -> None:
        """The user's parameters hold no memory until weights are attached again."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.new_empty(0)

    def attach_gradients(self, flat: Tensor) -> None:
        """Backward adds to views of `flat`."""
        for name, view in self.views(flat):
            if name in self.trainable:
                self.parameters[name].grad = view

    def detach_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients of one backward that was run without attached gradients."""
        taken = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        self.detach_gradients()
        return taken

    def attach_piece_gradients(self, reduced: Tensor) -> None:
        """The optimizer's parameters get views of this rank's reduced gradient."""
        for piece in self.pieces:
            gradient = reduced[piece.first - self.first : piece.last - self.first]
            shape, stride = piece.parameter.shape, piece.parameter.stride()
            piece.parameter.grad = gradient.as_strided(shape, stride)

    def _ranges(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Where each parameter lies, and the length of all.

        Whole vectors start each parameter where its own tensor would be aligned, because
        convolutions add in another order otherwise. Partitioned ones are packed: with replicas
        nothing is bitwise, and every byte of them travels.
        """
        found: dict[str, tuple[int, int]] = {}
        end = 0
        for name, parameter in self.parameters.items():
            step = 1 if self.partitioned else _ALIGNMENT_BYTES // parameter.element_size()
            first = -(-end // step) * step
            end = first + parameter.numel()
            found[name] = (first, end)
        return found, end

    def _pieces(self) -> Iterator[Piece]:
        for name, (first, last) in self.ranges.items():
            low, high = max(first, self.first), min(last, self.last)
            if name not in self.trainable or low >= high:
                continue
            parameter = self.parameters[name]
            if self.partitioned:
                view = self.shard[low - self.first : high - self.first]
                parameter = torch.nn.Parameter(view)
            yield Piece(name=name, parameter=parameter, first=low, last=high)


@dataclass(frozen=True, slots=True)
class _Place:
    """A view of gathered weights, wherever the unit lies when it is needed."""

    unit: str
    dtype: torch.dtype
    """Not always the weights' own: a complex view of them counts in pairs."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WeightBuffers:
    """The gather buffers of a rank, and which unit each holds.

    Forward saves views of gathered weights for backward, but by then the buffer may hold another
    stage, and the stage's weights lie in another buffer. `pack` and `unpack` are saved-tensor hooks
    that keep the place of such a view instead of the view.
    """

    def __init__(self, states: dict[str, UnitState], buffers: dict[str, set[str]]) -> None:
        """
        Args:
            states: units of this rank.
            buffers: gather buffer -> units that the plan gathers into it.
        """
        self.tensors = {
            name: max(
                (states[unit].shard.new_empty(states[unit].padded_length) for unit in units),
                key=Tensor.numel,
            )
            for name, units in buffers.items()
        }
        self._by_address = {t.untyped_storage().data_ptr(): n for n, t in self.tensors.items()}
        self._unit_of: dict[str, str] = {}

    def hold(self, buffer: str, state: UnitState) -> Tensor:
        """The part of a buffer that a unit is gathered into."""
        for stale in [name for name, unit in self._unit_of.items() if unit == state.unit.name]:
            del self._unit_of[stale]
        self._unit_of[buffer] = state.unit.name
        return self.tensors[buffer][: state.padded_length]

    def apart(self, tensor: Tensor) -> Tensor:
        """A stage's output, copied if it is a view of weights that another unit may replace."""
        inside = tensor.untyped_storage().data_ptr() in self._by_address
        return tensor.clone() if inside else tensor

    def pack(self, tensor: Tensor) -> "Tensor | _Place":
        buffer = self._by_address.get(tensor.untyped_storage().data_ptr())
        if buffer is None or tensor.numel() == 0:
            return tensor
        if tensor.is_conj() or tensor.is_neg():
            return tensor.resolve_conj().resolve_neg()
        return _Place(
            self._unit_of[buffer],
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
        )

    def unpack(self, packed: "Tensor | _Place") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        buffer = next(name for name, held in self._unit_of.items() if held == packed.unit)
        whole = self.tensors[buffer]
        place = torch.empty(0, dtype=packed.dtype, device=whole.device)
        return place.set_(whole.untyped_storage(), packed.offset, packed.shape, packed.stride)
