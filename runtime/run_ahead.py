"""How far a process may issue ahead of its device.

Without a limit a process would issue many steps before the device has done one: what it stages for
the device in host memory, and what waits to be sent, would pile up, and an error would be seen long
after its cause. This module knows events. It does not know instructions.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["MOST_AHEAD", "Event", "RunAhead"]

MOST_AHEAD = 8
"""Compute instructions that may be issued and not over. One layer's kernels take about as long as a
process takes to issue a few hundred, so that few keep a device busy; more would only hold more
memory."""
_POLL_SECONDS = 2e-5


class Event(Protocol):
    """A place among what a device has been given."""

    def query(self) -> bool:
        """Whether it has been passed."""


class RunAhead:
    """One device's compute."""

    def __init__(
        self,
        event: Callable[[], Event],
        deadline_seconds: float,
        late: Callable[[], Exception],
        most: int = MOST_AHEAD,
    ) -> None:
        """
        Args:
            event: records one behind what compute has been given so far.
            deadline_seconds: of a wait.
            late: makes the error of a wait that takes longer.
            most: computes that may be issued and not over.
        """
        self._event, self._late = event, late
        self._deadline_seconds = deadline_seconds
        self._most = most
        self._issued: deque[Event] = deque()

    def begin(self) -> None:
        """Before a compute is issued: blocks while `most` are under way.

        Raises:
            DeadlineError: or whatever `late` makes.
        """
        if len(self._issued) < self._most:
            return
        self.wait(self._issued.popleft())

    def end(self) -> None:
        """It has been issued."""
        self._issued.append(self._event())

    def wait(self, event: Event) -> None:
        """Block until the device has passed an event.

        Raises:
            DeadlineError: or whatever `late` makes.
        """
        if event.query():
            return
        ends = time.monotonic() + self._deadline_seconds
        while not event.query():
            if time.monotonic() > ends:
                raise self._late()
            time.sleep(_POLL_SECONDS)
