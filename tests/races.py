"""A GPU's streams on a CPU: work is done where it is issued, and what nothing orders is found.

Each stream knows how far it comes after every other one; what a thread has waited for is over for
all that it starts from then on. Two uses of one storage on two streams, one of them a write, must
be ordered, and a storage may be freed only when compute comes after all its uses: its memory is
compute's to take again (or the host's, if that made it). This replaces the device, not the code
under test.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.storages import storage_key, tensors_in

__all__ = ["Device", "Event", "HostJob", "Races", "Stream"]

Known = dict["Stream", int]


class _Seen(threading.local):
    """What this thread has waited for."""

    def __init__(self) -> None:
        self.known: Known = {}


_SEEN = _Seen()


class Stream:
    """Number of operations of each stream that this one comes after, its own included."""

    def __init__(self, _: Any = None) -> None:
        self.known: Known = {}

    def wait_stream(self, other: "Stream") -> None:
        _join(self.known, other.known)

    def wait_event(self, event: "Event") -> None:
        _join(self.known, event.known)

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _join(_SEEN.known, self.known)


class Event:
    """Passed at once."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.is_timed = enable_timing
        self.known: Known = {}
        self.at_seconds = 0.0
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.known, self.stream = dict(stream.known), stream
        self.at_seconds = time.perf_counter()

    def query(self) -> bool:
        _join(_SEEN.known, self.known)
        return True

    def synchronize(self) -> None:
        self.query()

    def elapsed_time(self, later: "Event") -> float:
        assert self.is_timed
        assert later.is_timed
        return (later.at_seconds - self.at_seconds) * 1e3


class Device:
    """What is used of torch.cuda, for one rank."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.compute, self.host = Stream(), Stream()
        self._current = threading.local()

    def current_stream(self, _: Any = None) -> Stream:
        found: Stream = getattr(self._current, "stream", self.compute)
        return found

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = before

    def seen(self) -> Known:
        """What is over as this thread knows it: on the host, all that it did itself."""
        on_host = self.current_stream() is self.host
        return _SEEN.known | (self.host.known if on_host else {})

    def see(self, known: Known) -> None:
        """Another thread has told this one."""
        _join(_SEEN.known, known)


class HostJob:
    """A job of a thread of the host, which starts behind what this thread has seen to be over."""

    def __init__(self, job: Callable[[], None], device: Device, races: "Races") -> None:
        self._job, self._device, self._races = job, device, races
        self._before, self._after = device.seen(), Known()

    def run(self) -> None:
        self._device.see(self._before)
        with self._device.stream(self._device.host), self._races:
            self._job()
            self._after = self._device.seen()

    def was_waited_for(self) -> None:
        self._device.see(self._after)


class Races(TorchDispatchMode):
    """Found while it is entered, in the threads that entered it."""

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.streams: set[Stream] = set()
        """That something ran on."""
        self._device = device
        self._writes: dict[int, tuple[Stream, int]] = {}
        self._reads: dict[int, Known] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if is_view or func._schema.name == "aten::set_":
            return result
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        reads = [t for name, v in given.items() if name not in written for t in tensors_in(v)]
        writes = [t for name in written if name in given for t in tensors_in(given[name])]
        self.use(str(func), reads, [*writes, *tensors_in(result)])
        return result

    def use(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """An operation on the current stream."""
        with self._lock:
            self._use(what, reads, writes)

    def _use(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        stream = self._device.current_stream()
        self.streams.add(stream)
        number = stream.known[stream] = stream.known.get(stream, 0) + 1
        changed = {self._key(tensor) for tensor in writes}
        for key in {self._key(tensor) for tensor in reads} | changed:
            uses = [self._writes[key]] if key in self._writes else []
            if key in changed:
                uses += self._reads.pop(key, {}).items()
                self._writes[key] = stream, number
            else:
                self._reads.setdefault(key, {})[stream] = number
            if not _all_before(uses, stream):
                self.found.append(what)

    def _key(self, tensor: Tensor) -> int:
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key not in self._alive:
            device = self._device
            is_hosts = device.current_stream() is device.host
            owner = device.host if is_hosts else device.compute

            def freed(_: object) -> None:
                with self._lock:
                    del self._alive[key]
                    last = self._writes.pop(key, None)
                    uses = [*self._reads.pop(key, {}).items(), *([last] if last else [])]
                    if not _all_before(uses, owner):
                        self.found.append("freed")

            self._alive[key] = weakref.ref(storage, freed)
        return key


def _all_before(uses: Iterable[tuple[Stream, int]], stream: Stream) -> bool:
    seen = _SEEN.known
    return all(
        max(stream.known.get(other, 0), seen.get(other, 0)) >= number for other, number in uses
    )


def _join(known: Known, more: Known) -> None:
    for stream, number in more.items():
        known[stream] = max(number, known.get(stream, 0))
