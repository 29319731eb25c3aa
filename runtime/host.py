"""Buffers in host memory: state and stored inputs that are offloaded, and the checkpoint.

A copy takes the room of an earlier one that nobody needs; a checkpoint that was handed out never
changes. State that is updated where it is changes hands (`take`, `put`). On a GPU host memory is
pinned, and copies run beside compute, on a stream for each direction. On the CPU they are plain
tensors, kept apart so that a memory measurement can tell them from the device's. With a folder they
are in files there (`runtime.mapped`), and not pinned.
This module knows values. It does not know when anything happens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from planner.plan.names import kind_of
from runtime.loss_scale import LossScale
from runtime.mapped import MappedFolder
from runtime.rooms import HostCopy, Rooms, over_copies, over_tensors
from runtime.streams import OVER, Action, Streams
from runtime.transport import Pending

__all__ = ["Checkpoint", "HostMemory", "Taken"]

Leaf = TypeVar("Leaf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One rank's part of the state after a whole step, in host memory."""

    num_steps: int
    """Steps taken before it."""
    shards: Mapping[str, Tensor]
    """By unit: this rank's part of its flat vector."""
    moments: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By unit and parameter: what the optimizer keeps for this rank's part, under its own names."""
    loss_scale: LossScale | None = None
    """Of the next step; None but in float16."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a host: buffer held, for one user alone."""

    value: Any
    """Tensors in host memory, or dicts and lists with them."""
    copies: tuple[HostCopy, ...]
    """Of these tensors."""
    settle: Action
    """Blocks until copies to it and from it are over; nothing may be read or changed before."""


class HostMemory:
    """The host: buffers of one rank."""

    def __init__(self, streams: Streams, folder: Path | None = None) -> None:
        """Raises UsageError if no file can be made in the folder."""
        self._streams = streams
        files = None if folder is None else MappedFolder(folder)
        self._rooms = Rooms(partial(_make_room, files))
        self._values: dict[str, Any] = {}
        self._checkpoint = Checkpoint(num_steps=0, shards={}, moments={})
        self._in_checkpoint: list[HostCopy] = []
        self._is_handed_out = False
        """Whether somebody has been given the checkpoint: then its room is theirs."""
        self._copying: dict[str, Pending] = {}
        """The last copy to or from each buffer."""

    def keep(self, name: str, value: Any) -> Pending:
        """`name` (a host: buffer) = a copy of tensors, or of dicts and lists with tensors in them.

        The tensors may be let go at once, but not changed before `wait` of the result returns.
        """
        sources = _leaves(Tensor, value)
        last = _leaves(HostCopy, self._values.pop(name, None))
        if not _share_memory(sources, last):  # else what is kept is partly what was kept
            self._free(last)  # so that there is one copy at a time
        pending = self._streams.beside("out", lambda: self._keep(name, value), sources)
        self._copying[name] = pending
        return pending

    def fetch(self, name: str) -> tuple[Any, Pending]:
        """A copy on the device of what a host: buffer holds, to be used after `wait`."""
        # Allocated on the stream that will use it, filled on the copies' own.
        pairs: list[tuple[HostCopy, Tensor]] = []

        def room_for(copy: HostCopy) -> Tensor:
            room = torch.empty_like(copy.tensor, device=copy.device)
            pairs.append((copy, room))
            return room

        def fill() -> None:
            for copy, room in pairs:
                room.copy_(copy.tensor, non_blocking=True)

        value = over_copies(room_for, self._values[name])
        pending = self._streams.beside("in", fill, [room for _, room in pairs])
        self._copying[name] = pending
        for copy, _ in pairs:
            copy.reader = pending
        return value, pending

    def load(self, rows: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Pending]:
        """Copies on the device of tensors that whoever made them may change at once."""
        staged = [
            _pinned(each) if each.device.type == "cpu" and device.type == "cuda" else each
            for each in rows
        ]
        rooms = [torch.empty_like(each, device=device) for each in staged]

        def fill() -> None:
            for room, each in zip(rooms, staged, strict=True):
                room.copy_(each, non_blocking=True)

        return rooms, self._streams.beside("in", fill, [*rooms, *staged])

    def take(self, name: str) -> Taken:
        """What a host: buffer holds, to be read and changed by the caller alone. The buffer holds
        nothing until `put`."""
        held, pending = self._values.pop(name), self._copying.pop(name, OVER)
        copies = tuple(_leaves(HostCopy, held))
        return Taken(over_copies(_tensor, held), copies, self._streams.blocking(pending))

    def renewed(self, taken: Taken) -> Taken:
        """Copies of what was taken, for a checkpoint to keep that. Blocks."""
        again = {id(each.tensor): self._again(each.tensor, each.device) for each in taken.copies}
        value = over_tensors(lambda tensor: again[id(tensor)].tensor, taken.value)
        return Taken(value, tuple(again.values()), taken.settle)

    def put(self, values: Mapping[str, Any], taken: Sequence[Taken]) -> None:
        """Set host: buffers to tensors of host memory, most of which were taken; what else was
        taken is needed no more."""
        known = {id(copy.tensor): copy for each in taken for copy in each.copies}

        def placed(tensor: Tensor) -> HostCopy:
            copy = known.pop(id(tensor), None)
            return self._again(tensor, tensor.device) if copy is None else copy

        for name, value in values.items():
            self._values[name] = over_tensors(placed, value)
        self._free(list(known.values()))

    def values(self, name: str) -> Any:
        """What a host: buffer holds, in host memory: to be read, not to be changed."""
        self._streams.settle_copies()
        return over_copies(_tensor, self._values[name])

    def drop(self, name: str) -> None:
        """Let go of what a host: buffer holds, if anything."""
        self._copying.pop(name, None)
        self._free(_leaves(HostCopy, self._values.pop(name, None)))

    def complete(self, num_steps: int, loss_scale: LossScale | None = None) -> None:
        """What shards and moments hold now is the checkpoint after so many steps."""
        found: dict[str, dict[str, Any]] = {"shard": {}, "moments": {}}
        copies: list[HostCopy] = []
        for name, value in self._values.items():
            buffer = name.removeprefix("host:")
            if kind_of(buffer) in found:
                unit = buffer.partition(":")[2]
                found[kind_of(buffer)][unit] = over_copies(_tensor, value)
                copies += _leaves(HostCopy, value)
        before, self._in_checkpoint = self._in_checkpoint, copies
        if not self._is_handed_out:
            still = {id(copy) for copy in copies}
            self._free([copy for copy in before if id(copy) not in still])
        self._is_handed_out = False
        self._checkpoint = Checkpoint(
            num_steps=num_steps,
            shards=found["shard"],
            moments=found["moments"],
            loss_scale=loss_scale,
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The last complete one."""
        self._streams.settle_copies()
        self._is_handed_out = True
        return self._checkpoint

    def _keep(self, name: str, value: Any) -> None:
        self._values[name] = over_tensors(self._copied, value)

    def _copied(self, tensor: Tensor) -> HostCopy:
        with _disable_current_modes():
            copy = self._rooms.take(tensor)
            if copy.reader is not None:
                self._streams.behind(copy.reader)
            copy.tensor.copy_(tensor.detach(), non_blocking=True)
        return HostCopy(copy.tensor, tensor.device)

    def _again(self, tensor: Tensor, device: torch.device) -> HostCopy:
        """A copy of a tensor of host memory. Blocks while somebody reads what is in its room."""
        room = self._rooms.take(tensor, device)
        if room.reader is not None:
            self._streams.blocking(room.reader)()
        return HostCopy(room.tensor.copy_(tensor), device)

    def _free(self, copies: list[HostCopy]) -> None:
        """What the checkpoint holds is free when the next one is complete."""
        held = {id(copy) for copy in self._in_checkpoint}
        self._rooms.give_back(copy for copy in copies if id(copy) not in held)


def _make_room(
    files: MappedFolder | None,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    pin: bool,
) -> Tensor:
    if files is not None:
        return files.empty_strided(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, pin_memory=pin)


def _tensor(copy: HostCopy) -> Tensor:
    return copy.tensor


def _pinned(tensor: Tensor) -> Tensor:
    """A copy, whose memory torch takes again once the device has read it."""
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def _leaves(kind: type[Leaf], value: Any) -> list[Leaf]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, kind)]


def _share_memory(sources: list[Tensor], copies: list[HostCopy]) -> bool:
    places = {copy.tensor.untyped_storage().data_ptr() for copy in copies}
    return any(source.untyped_storage().data_ptr() in places for source in sources)
