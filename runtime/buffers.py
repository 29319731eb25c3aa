"""Named values of a step in flight, and what still arrives in them or leaves them.

A transfer, collective or copy is started where it stands in the program; the first instruction that
conflicts with one of its buffers waits for it.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from planner.plan.types import Instruction
from runtime.transport import Pending, Sending

__all__ = ["MOST_KEPT_BYTES", "Buffers", "DeviceSends", "Sends"]

MOST_KEPT_BYTES = 1 << 12
"""Of tensors that are kept until the step ends rather than freed once they have left."""


class Buffers(dict[str, Any]):
    """Values by buffer name."""

    def __init__(self) -> None:
        super().__init__()
        self._writing: dict[str, tuple[Pending, tuple[str, ...]]] = {}
        """With the buffers that it reads."""
        self._reading: dict[str, list[Pending]] = {}

    def drop(self, names: Iterable[str]) -> None:
        """Let go of what the buffers hold, if anything."""
        for name in names:
            self.pop(name, None)

    def pending(self, instruction: Instruction, pending: Pending) -> None:
        """The instruction's buffers are in use until `pending` is over."""
        for name in instruction.reads:
            self._reading.setdefault(name, []).append(pending)
        for name in instruction.writes:
            self._writing[name] = pending, instruction.reads

    def arriving(self, names: Iterable[str]) -> Iterator[Pending]:
        """What still arrives in buffers."""
        for name in names:
            if name in self._writing:
                yield self._writing[name][0]

    def settle(self, written: Iterable[str], read: Iterable[str]) -> None:
        """Wait for what still arrives in buffers of `written`, and leaves those of `read`."""
        for name in written:
            if name in self._writing:
                pending, sources = self._writing.pop(name)
                pending.wait()
                self._forget(pending, sources)
        for name in read:
            for pending in self._reading.pop(name, ()):
                pending.wait()

    def finish(self) -> None:
        """Wait for whatever nothing waited for."""
        for pending, _ in self._writing.values():
            pending.wait()
        for readers in self._reading.values():
            for pending in readers:
                pending.wait()
        self._writing.clear()
        self._reading.clear()

    def _forget(self, pending: Pending, sources: Iterable[str]) -> None:
        """It is over, and what it read is not kept alive by it."""
        for name in sources:
            others = [other for other in self._reading.get(name, ()) if other is not pending]
            if others:
                self._reading[name] = others
            else:
                self._reading.pop(name, None)


class Sends:
    """Keeps each tensor on its way alive until it has left, and no longer.

    A thread waits for the sends in order, because a gloo send is over only once it is waited for.
    It is not woken for a few small tensors, which would cost more than they hold: they are kept.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Sending, Tensor]] = []
        self._kept_bytes = 0
        self._queue: queue.SimpleQueue[list[tuple[Sending, Tensor]] | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._outstanding = 0
        """Lists that the thread has not gone through."""
        self._error: BaseException | None = None
        threading.Thread(target=self._drain, name="sends", daemon=True).start()

    def add(self, pending: Sending, tensor: Tensor) -> None:
        """Watch over a send that was just started.

        Raises:
            RunError: an earlier send failed.
        """
        if self._error is not None:
            raise self._error
        self._kept.append((pending, tensor))
        self._kept_bytes += tensor.nbytes
        if self._kept_bytes > MOST_KEPT_BYTES:
            with self._done:
                self._outstanding += 1
            self._queue.put(self._kept)
            self._kept, self._kept_bytes = [], 0

    def wait(self) -> None:
        """Block until all have left (each send has the plan's deadline)."""
        with self._done:
            self._done.wait_for(lambda: not self._outstanding or self._error)
        if self._error is not None:
            raise self._error
        for pending, _ in self._kept:
            pending.wait()
        self._kept, self._kept_bytes = [], 0

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)

    def _drain(self) -> None:
        while (items := self._queue.get()) is not None:
            try:
                while items:
                    items[0][0].wait()
                    del items[0]
            except BaseException as error:
                self._error = error
            with self._done:
                self._outstanding -= 1
                self._done.notify_all()
            if self._error is not None:
                return


class DeviceSends:
    """The same where the device works by itself: nobody needs to wait for a send to end it.

    Waiting here would hold up compute, so tensors are let go as their sends are seen to be over.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Sending, Tensor]] = deque()

    def add(self, pending: Sending, tensor: Tensor) -> None:
        """Watch over a send that was just started."""
        while self._kept and self._kept[0][0].is_over():
            self._drop_first()
        self._kept.append((pending, tensor))

    @property
    def newest(self) -> Pending:
        """The send that was added last."""
        return self._kept[-1][0]

    def wait(self) -> None:
        """What the device is given from now on comes after all of them."""
        while self._kept:
            self._drop_first()

    def close(self) -> None:
        """Nothing to end."""

    def _drop_first(self) -> None:
        self._kept[0][0].wait()
        self._kept.popleft()
