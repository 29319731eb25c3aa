"""Parameters of a rank as flat vectors: weights, gradients, and this replica's part of them.

A unit's parameters lie one after another in one flat vector. The user's parameters become views of
it, so the user's modules compute on it directly. With partition 1 to 3 each replica of a partition
group owns one equal part (padded) of the vector. With 1 and 2 that part is a view of the whole,
which stays. With 3 the whole exists only in a gather buffer, while a stage needs it. So it does
with partition 0 where the state lives in host memory, and the shard is here while it is used. In
mixed precision the shard is always a vector of its own, the masters in float32, and the whole is
the copy to compute with.

This module knows memory and names. It does not know when anything happens.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planner.graph import DTYPE_BYTES
from planner.plan.flat import flat_ranges
from planner.plan.types import Plan, Unit
from runtime.layout import dense_stride, flat

__all__ = ["Piece", "UnitState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of one parameter that one replica owns."""

    name: str
    parameter: torch.nn.Parameter
    """What the optimizer sees: the user's own where this rank updates whole parameters in place."""
    first: int
    last: int
    """Range in the unit's flat vector (padded, all parts)."""


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
        self.partitioned = plan.partition > 0
        self.divides_gradients = plan.divides_gradients
        self.gathered = plan.gathers
        self.ranges, length = self._ranges(is_packed=plan.partition == 3)
        parts = plan.num_parts
        self.part_length = math.ceil(length / parts)
        self.padded_length = self.part_length * parts if self.partitioned else length
        dtype = next(iter(self.parameters.values())).dtype
        if plan.options.precision.is_mixed:
            dtype = getattr(torch, unit.dtype)
        self.dtype = str(dtype).removeprefix("torch.")
        """Of the shard, as plans spell it: by default the model's own parameters'."""
        self.weights_dtype = unit.compute_dtype or self.dtype
        whole = self._copied(dtype)
        self.first, self.last = 0, length
        if self.partitioned:
            self.first = replica % parts * self.part_length
            self.last = self.first + self.part_length
        self._whole: Tensor | None = None
        self._shard: Tensor | None = whole[self.first : self.last]
        if self.partitioned and (self.gathered or self.has_copy):
            self._shard = whole[self.first : self.last].clone()
        if not self.gathered:
            self._whole = whole.to(getattr(torch, self.weights_dtype))
            self.attach_weights(self._whole)
        self.pieces = tuple(self._pieces())

    @property
    def shard(self) -> Tensor:
        """This rank's part of the weights, where it is on the device."""
        assert self._shard is not None, f"the shard of {self.unit.name} is not on the device"
        return self._shard

    @property
    def whole(self) -> Tensor:
        """The whole weights, where they stay in place."""
        assert self._whole is not None, f"the weights of {self.unit.name} are in a pool"
        return self._whole

    @property
    def resident_tensors(self) -> list[Tensor]:
        """The whole weights in place; and the shard, if it is no part of them and on the device."""
        found = [] if self._whole is None else [self._whole]
        apart = self._shard is not None and (self._whole is None or self.has_copy)
        return [*found, *([self.shard] if apart else [])]

    @property
    def device(self) -> torch.device:
        """Where stages compute, even while no weights are there."""
        return next(iter(self.parameters.values())).device

    @property
    def has_copy(self) -> bool:
        """Whether stages compute with a copy in another type than the shard's."""
        return bool(self.unit.compute_dtype)

    @property
    def has_own_pieces(self) -> bool:
        """Whether the optimizer sees tensors of ours instead of the user's parameters."""
        return self.gathered or self.partitioned or self.has_copy

    @property
    def num_elements(self) -> int:
        """Of the flat vector, without what makes parts equal."""
        return max(end for _, end in self.ranges.values())

    def put_shard(self, shard: Tensor | None) -> None:
        """The shard comes to the device, or leaves it."""
        self._shard = shard
        self.attach_pieces(shard)

    def attach_pieces(self, shard: Tensor | None) -> None:
        """What the optimizer sees becomes parts of a shard, wherever that is, or of nothing."""
        for piece in self.pieces:
            if shard is None:
                piece.parameter.data = piece.parameter.data.new_empty(0)
            else:
                piece.parameter.data = self._view(shard, piece)

    def cast_into(self, whole: Tensor) -> Tensor:
        """This rank's part of the weights that stages compute with, made from the shard."""
        return whole[self.first : self.last].copy_(self.shard)

    def places_bytes(self) -> dict[int, int]:
        """id() of each parameter -> bytes before it in the flat vector of whole weights."""
        element_bytes = DTYPE_BYTES[self.weights_dtype]
        return {
            id(self.parameters[name]): first * element_bytes
            for name, (first, _) in self.ranges.items()
        }

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
        dtype = getattr(torch, self.weights_dtype)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.new_empty(0, dtype=dtype)

    def detach_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients of one backward that was run without attached gradients."""
        taken = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        self.detach_gradients()
        return taken

    def my_part(self, reduced: Tensor) -> Tensor:
        """Of a reduced gradient, what this rank updates its shard with."""
        if self.divides_gradients or not self.partitioned:
            return reduced
        return reduced[self.first : self.last]

    def piece_views(self, gradient: Tensor) -> list[Tensor]:
        """Views of this rank's part of the gradient, one for each piece."""
        return [self._view(gradient, piece) for piece in self.pieces]

    def attach_piece_gradients(self, views: Iterable[Tensor]) -> None:
        """The optimizer's parameters get what `piece_views` made."""
        for piece, view in zip(self.pieces, views, strict=True):
            piece.parameter.grad = view

    def _view(self, part: Tensor, piece: Piece) -> Tensor:
        """A piece of what is laid out as the shard is."""
        first = piece.first - self.first
        if self.partitioned:
            return part[first : piece.last - self.first]
        offset = int(part.storage_offset()) + first
        return part.as_strided(self.shapes[piece.name], self.strides[piece.name], offset)

    def _ranges(self, *, is_packed: bool) -> tuple[dict[str, tuple[int, int]], int]:
        """Where each parameter lies, and the length of all."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        element_bytes = DTYPE_BYTES[self.unit.weights_dtype]
        ranges = flat_ranges(sizes, element_bytes, is_packed=is_packed)
        return dict(zip(self.parameters, ranges, strict=True)), ranges[-1][1]

    def _copied(self, dtype: torch.dtype) -> Tensor:
        """The freshly built parameters in one padded vector."""
        example = next(iter(self.parameters.values()))
        whole = example.detach().new_zeros(self.padded_length, dtype=dtype)
        for name, view in self.views(whole):
            view.copy_(self.parameters[name].detach())
            if self.has_copy and name in self.trainable:
                self.parameters[name].grad_dtype = None  # gradients are added to float32 sums
        return whole

    def _pieces(self) -> Iterator[Piece]:
        for name, (first, last) in self.ranges.items():
            low, high = max(first, self.first), min(last, self.last)
            if name not in self.trainable or low >= high:
                continue
            piece = Piece(name=name, parameter=self.parameters[name], first=low, last=high)
            if self.has_own_pieces:
                view = self._view(self.shard, piece)
                piece = replace(piece, parameter=torch.nn.Parameter(view))
            yield piece
