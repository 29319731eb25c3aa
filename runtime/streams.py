"""What runs beside compute on a rank's device, and the moments at which things run there.

A CPU computes where it issues, so there copies are over when they return and moments are those of
the clock. `runtime.cuda` has the same for a GPU. This module knows copies, figures and moments. It
does not know instructions.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from planner.plan.types import Instruction
from runtime.transport import Pending

__all__ = ["OVER", "Action", "ClockMoments", "CpuStreams", "Figure", "Issued", "Moments", "Streams"]

Action = Callable[[], None]
Started = Callable[[], Iterable[Pending]]
"""What an action has started that is not over."""

Figure = Callable[[], float]
"""Waits for one number, if it is not here yet, and for nothing else."""


class Issued(NamedTuple):
    """An instruction of a program."""

    place: int
    """In the program."""
    instruction: Instruction
    started: Callable[[], Iterable[Pending]]
    """Behind its action: what that has started."""
    words: str
    """For errors."""


class Moments(Protocol):
    """When the instructions of a step ran, as the device knows it."""

    def seconds(self) -> tuple[float, ...]:
        """The start of the step, then start and end of each instruction. Waits for them."""


class Streams(Protocol):
    """A rank's device, as it is given work."""

    is_asynchronous: bool
    """Whether the device works on what it has been given while the process goes on."""

    def moment(self) -> Any:
        """When compute has come here: for `moments`."""

    def ready(self, issued: Issued, act: Action, /) -> Action:
        """The action of an instruction, with what the device needs around it."""

    def moments(self, found: list[Any]) -> Moments:
        """From `moment` at the start of a step, and before and after each instruction."""

    def beside(self, way: str, action: Action, held: Sequence[Tensor], /) -> Pending:
        """Run copies `in` to the device or `out` of it, behind what compute was given so far.

        `held` are tensors of the device that they use. They are kept until `wait`, so memory of
        compute needs no other protection from the copies.
        """

    def behind(self, pending: Pending) -> None:
        """Inside the action of `beside`: what follows comes after something else."""

    def blocking(self, pending: Pending) -> Action:
        """What blocks the process, in whichever thread, until copies of `beside` are over."""

    def figure(self, tensor: Tensor) -> Figure:
        """The one element of a tensor that is not changed any more."""

    def settle_copies(self) -> None:
        """Block until what was copied out is here."""


class _Over:
    """Something that was over when it was started."""

    def wait(self) -> None:
        pass

    def follow(self) -> None:
        pass


OVER = _Over()


class ClockMoments:
    """Seconds of the process's clock."""

    def __init__(self, found: list[float]) -> None:
        self._found = found

    def seconds(self) -> tuple[float, ...]:
        return tuple(self._found)


class CpuStreams:
    """The Streams of a CPU: everything at once."""

    is_asynchronous = False
    moment = staticmethod(time.perf_counter)

    def ready(self, _: Issued, act: Action, /) -> Action:
        return act

    def moments(self, found: list[Any]) -> Moments:
        return ClockMoments(found)

    def beside(self, _: str, action: Action, __: Sequence[Tensor], /) -> Pending:
        action()
        return OVER

    def behind(self, pending: Pending) -> None:
        pass

    def blocking(self, pending: Pending) -> Action:
        return pending.wait

    def figure(self, tensor: Tensor) -> Figure:
        return tensor.item

    def settle_copies(self) -> None:
        pass
