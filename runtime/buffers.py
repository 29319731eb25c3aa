"""Named values of a step in flight, and what still arrives in them or leaves them.

A transfer, collective or copy is started where it stands in the program; the first instruction that
conflicts with one of its buffers waits for it.
"""

import queue
import threading
from typing import Any

from torch import Tensor

from planner.plan.types import Instruction
from runtime.transport import Pending

__all__ = ["Buffers", "Sends"]


class Buffers:
    """Values by buffer name."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._writing: dict[str, Pending] = {}
        self._reading: dict[str, list[Pending]] = {}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def drop(self, name: str) -> None:
        """Let go of what a buffer holds, if anything."""
        self._values.pop(name, None)

    def pending(self, instruction: Instruction, pending: Pending) -> None:
        """The instruction's buffers are in use until `pending` is over."""
        for name in instruction.reads:
            self._reading.setdefault(name, []).append(pending)
        for name in instruction.writes:
            self._writing[name] = pending

    def settle(self, instruction: Instruction) -> None:
        """Wait for everything that conflicts with the instruction's buffers."""
        for name in (*instruction.reads, *instruction.writes):
            pending = self._writing.pop(name, None)
            if pending is not None:
                pending.wait()
        for name in instruction.writes:
            for pending in self._reading.pop(name, ()):
                pending.wait()

    def finish(self) -> None:
        """Wait for whatever nothing waited for."""
        for pending in self._writing.values():
            pending.wait()
        for readers in self._reading.values():
            for pending in readers:
                pending.wait()
        self._writing.clear()
        self._reading.clear()


class Sends:
    """Keeps each tensor on its way alive until it has left, and no longer.

    A thread waits for the sends in order, because a gloo send is over only once it is waited for.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Pending, Tensor] | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._outstanding = 0
        self._error: BaseException | None = None
        threading.Thread(target=self._drain, name="sends", daemon=True).start()

    def add(self, pending: Pending, tensor: Tensor) -> None:
        """Watch over a send that was just started.

        Raises:
            RunError: an earlier send failed.
        """
        self._raise()
        with self._done:
            self._outstanding += 1
        self._queue.put((pending, tensor))

    def wait(self) -> None:
        """Block until all have left (each send has the plan's deadline)."""
        with self._done:
            self._done.wait_for(lambda: not self._outstanding or self._error)
        self._raise()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _drain(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                item[0].wait()
            except BaseException as error:
                self._error = error
            item = None
            with self._done:
                self._outstanding -= 1
                self._done.notify_all()
            if self._error is not None:
                return
