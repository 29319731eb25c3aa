"""Buffers in host memory: state and stored inputs that are offloaded, and the checkpoint.

A copy is made anew each time, so a copy once handed out never changes, but for state that is
updated where it is (`take`, `put`). On a GPU host memory is
pinned, and copies run beside compute, on a stream for each direction. On the CPU they are plain
tensors, kept apart so that a memory measurement can tell them from the device's. With a folder they
are in files there (`runtime.mapped`), and not pinned.
This module knows values. It does not know when anything happens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from planner.plan.names import kind_of
from runtime.layout import dense_stride
from runtime.loss_scale import LossScale
from runtime.mapped import MappedFolder
from runtime.transport import Pending

__all__ = ["Checkpoint", "HostMemory"]


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
class _Copy:
    """A tensor in host memory."""

    tensor: Tensor
    device: torch.device
    """Where it is from, and goes back to: optimizers keep some figures on the CPU."""


class HostMemory:
    """The host: buffers of one rank."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """Raises UsageError if no file can be made in the folder."""
        self._device = device
        self._files = None if folder is None else MappedFolder(folder)
        self._values: dict[str, Any] = {}
        self._checkpoint = Checkpoint(num_steps=0, shards={}, moments={})
        self._copying: dict[str, _Copying] = {}
        """The last copy to or from each buffer."""
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {way: torch.cuda.Stream(device) for way in ("in", "out")}

    def keep(self, name: str, value: Any) -> Pending:
        """`name` (a host: buffer) = a copy of tensors, or of dicts and lists with tensors in them.

        The tensors may be let go at once, but not changed before `wait` of the result returns.
        """
        copying = self._copying[name] = self._beside("out", lambda: self._keep(name, value))
        return copying

    def fetch(self, name: str) -> tuple[Any, Pending]:
        """A copy on the device of what a host: buffer holds, to be used after `wait`."""
        # Allocated on the stream that will use it, filled on the copies' own.
        pairs: list[tuple[_Copy, Tensor]] = []

        def room_for(copy: _Copy) -> Tensor:
            room = torch.empty_like(copy.tensor, device=copy.device)
            pairs.append((copy, room))
            return room

        value = _over(_Copy, room_for, self._values[name])
        copying = self._copying[name] = self._beside("in", lambda: self._fill(pairs))
        return value, copying

    def take(self, name: str) -> tuple[Any, Callable[[], None]]:
        """What a host: buffer holds, to be read and changed by the caller alone, once the function
        has returned: it waits for copies of it. The buffer holds nothing until `put`."""
        value = _over(_Copy, lambda copy: copy.tensor, self._values.pop(name))
        copying = self._copying.pop(name, None)
        return value, (lambda: None) if copying is None else copying.settle

    def put(self, name: str, value: Any) -> None:
        """`name` = these tensors of host memory; copies, where they belong in files and are not."""
        self._values[name] = _over(Tensor, self._placed, value)

    def renewed(self, value: Any) -> Any:
        """Copies of what was taken, for a checkpoint to keep that."""
        return _over(Tensor, lambda tensor: self._room(tensor).copy_(tensor), value)

    def values(self, name: str) -> Any:
        """What a host: buffer holds, in host memory: to be read, not to be changed."""
        self._settle()
        return _over(_Copy, lambda copy: copy.tensor, self._values[name])

    def drop(self, name: str) -> None:
        """Let go of what a host: buffer holds, if anything."""
        self._values.pop(name, None)

    def complete(self, num_steps: int, loss_scale: LossScale | None = None) -> None:
        """What shards and moments hold now is the checkpoint after so many steps."""
        found: dict[str, dict[str, Any]] = {"shard": {}, "moments": {}}
        for name, value in self._values.items():
            buffer = name.removeprefix("host:")
            if kind_of(buffer) in found:
                unit = buffer.partition(":")[2]
                found[kind_of(buffer)][unit] = _over(_Copy, lambda copy: copy.tensor, value)
        self._checkpoint = Checkpoint(
            num_steps=num_steps,
            shards=found["shard"],
            moments=found["moments"],
            loss_scale=loss_scale,
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The last complete one."""
        self._settle()
        return self._checkpoint

    def _settle(self) -> None:
        """Whatever was copied to the host is there."""
        if "out" in self._streams:
            self._streams["out"].synchronize()

    def _keep(self, name: str, value: Any) -> None:
        self._values.pop(name, None)  # the last copy, so that there is one at a time
        self._values[name] = _over(Tensor, self._copied, value)

    def _copied(self, tensor: Tensor) -> _Copy:
        with _disable_current_modes():
            host = self._room(tensor).copy_(tensor.detach(), non_blocking=True)
        if "out" in self._streams and tensor.is_cuda:
            tensor.record_stream(self._streams["out"])
        return _Copy(host, tensor.device)

    def _room(self, tensor: Tensor) -> Tensor:
        shape, dtype = tuple(tensor.shape), tensor.dtype
        strides = dense_stride(shape, tensor.stride())
        if self._files is not None:
            return self._files.empty_strided(shape, strides, dtype)
        pin = self._device.type == "cuda"
        return torch.empty_strided(shape, strides, dtype=dtype, pin_memory=pin)

    def _placed(self, tensor: Tensor) -> _Copy:
        is_apart = self._files is not None and not self._files.holds(tensor)
        return _Copy(self._room(tensor).copy_(tensor) if is_apart else tensor, self._device)

    def _fill(self, pairs: list[tuple[_Copy, Tensor]]) -> None:
        for copy, room in pairs:
            room.copy_(copy.tensor, non_blocking=True)
            if "in" in self._streams and room.is_cuda:
                room.record_stream(self._streams["in"])

    def _beside(self, way: str, action: Callable[[], None]) -> "_Copying":
        """Run it on the stream of a direction, behind what the device has been given so far."""
        if way not in self._streams:
            action()
            return _Copying(None, self._device)
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            action()
        return _Copying(stream.record_event(), self._device)


class _Copying:
    """A copy under way on a stream of its own; None: it is over."""

    def __init__(self, event: torch.cuda.Event | None, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """Whatever the device is given from now on comes after the copy."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def settle(self) -> None:
        """Block until it is over."""
        if self._event is not None:
            self._event.synchronize()


def _over(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """The value with `function` of each `kind` inside it."""
    return pytree.tree_map_only(kind, function, value)
