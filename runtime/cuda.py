"""The Streams of a GPU: compute, copies each way, and what watches transfers and collectives.

Compute runs on the stream that is current when the executor is used. Copies have a stream for each
direction, and every NCCL communicator has one of its own. What one of these starts comes after all
that compute was given before it, which is the order that a plan's programs are issued in; compute
comes after it where the buffers say so. The process waits for none of it. Moments are events, read
when somebody asks. This module knows streams and events. It does not know values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planner.errors import DeadlineError
from planner.plan.types import Instruction, Opcode, Plan
from runtime.ranks import rank_name
from runtime.run_ahead import RunAhead
from runtime.streams import Action, CpuStreams, Figure, Issued, Moments, Streams
from runtime.transport import Pending

__all__ = ["CudaMoments", "CudaStreams", "streams_of"]

_COMPUTES = (
    Opcode.FORWARD, Opcode.RECOMPUTE, Opcode.BACKWARD, Opcode.BACKWARD_INPUT,
    Opcode.BACKWARD_WEIGHT, Opcode.UPDATE,
)  # fmt: skip
"""What the process may be ahead by."""


class _Beside(NamedTuple):
    """An instruction that did not run on the stream of compute."""

    start: Any
    end: Any
    words: str
    """For errors."""


class CudaStreams:
    """Of one rank on one GPU."""

    is_asynchronous = True

    def __init__(
        self, device: torch.device, here: str, deadline_seconds: float, cuda: Any = torch.cuda
    ) -> None:
        """
        Args:
            device: with its index.
            here: the rank's name, for errors.
            deadline_seconds: how long the process waits for the device at most.
            cuda: torch's module of the device.
        """
        self._device, self._cuda = device, cuda
        self._here, self._deadline_seconds = here, deadline_seconds
        self._ways = {way: cuda.Stream(device) for way in ("in", "out")}
        self._watches: dict[tuple[str, Opcode], Any] = {}
        """By stream of the plan and opcode: a stream on which nothing runs. It goes along with what
        runs where no event can be recorded, on a communicator's own stream."""
        self._beside: dict[int, _Beside] = {}
        """Index -> what did not run on the stream of compute, in this step."""
        self._run_ahead = RunAhead(self._passed, deadline_seconds, self._late)

    def moment(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._compute)
        return event

    def ready(self, issued: Issued, act: Action, /) -> Action:
        if issued.instruction.stream != "compute":
            return self._watched(issued, act)
        return self._limited(act) if issued.instruction.opcode in _COMPUTES else act

    def moments(self, found: list[Any]) -> Moments:
        for index, beside in self._beside.items():
            found[2 * index + 1 : 2 * index + 3] = beside.start, beside.end
        self._beside = {}
        return CudaMoments(found)

    def beside(self, way: str, action: Action, held: Sequence[Tensor], /) -> Pending:
        stream = self._ways[way]
        stream.wait_stream(self._compute)
        with self._cuda.stream(stream):
            action()
        return _Copying(self, stream.record_event(), held)

    def behind(self, pending: Pending) -> None:
        pending.follow()

    def blocking(self, pending: Pending) -> Action:
        if not isinstance(pending, _Copying):  # it was over when it was started
            return pending.wait

        def block() -> None:
            self._run_ahead.wait(pending.event)
            pending.let_go()

        return block

    def figure(self, tensor: Tensor) -> Figure:
        here = torch.empty((), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        here.copy_(tensor, non_blocking=True)
        event = self._passed()

        def read() -> float:
            self._run_ahead.wait(event)
            return here.item()

        return read

    def settle_copies(self) -> None:
        self._ways["out"].synchronize()

    def follow(self, event: Any) -> None:
        """What the current stream is given from now on comes after an event."""
        self._compute.wait_event(event)

    @property
    def _compute(self) -> Any:
        return self._cuda.current_stream(self._device)

    def _passed(self) -> Any:
        event = self._cuda.Event()
        event.record(self._compute)
        return event

    def _limited(self, act: Action) -> Action:
        run_ahead = self._run_ahead

        def run() -> None:
            run_ahead.begin()
            act()
            run_ahead.end()

        return run

    def _watched(self, issued: Issued, act: Action) -> Action:
        side = self._side(issued.instruction)

        def run() -> None:
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            side.wait_stream(self._compute)
            start.record(side)
            act()
            side.wait_stream(self._compute)  # a part of it may be compute's
            with self._cuda.stream(side):
                for pending in issued.started():
                    pending.follow()
            end.record(side)
            self._beside[issued.place] = _Beside(start, end, issued.words)

        return run

    def _side(self, instruction: Instruction) -> Any:
        """Where moments of what does not run on the stream of compute are recorded."""
        way = self._ways.get(instruction.stream.removeprefix("copy."))
        if way is not None:
            return way
        key = instruction.stream, instruction.opcode
        if key not in self._watches:
            self._watches[key] = self._cuda.Stream(self._device)
        return self._watches[key]

    def _late(self) -> Exception:
        """Compute is stuck: behind the first thing beside it that is not over."""
        unfinished = (each.words for each in self._beside.values() if not each.end.query())
        what = next(unfinished, "compute")
        return DeadlineError(
            f"{self._here}: {what}: not over within the deadline of {self._deadline_seconds:g} s",
            hint="see what the other ranks are doing; a slow network or a slow first step needs a "
            "longer deadline (--deadline)",
        )


class _Copying:
    """Copies under way on a stream of their own."""

    def __init__(self, streams: CudaStreams, event: Any, held: Sequence[Tensor]) -> None:
        self._streams, self.event = streams, event
        self._held = held

    def wait(self) -> None:
        """Whatever the current stream is given from now on comes after the copies."""
        self.follow()
        self.let_go()

    def let_go(self) -> None:
        """Of what the copies used."""
        self._held = ()

    def follow(self) -> None:
        self._streams.follow(self.event)


class CudaMoments:
    """Events of a step."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events
        self._seconds: tuple[float, ...] = ()

    def seconds(self) -> tuple[float, ...]:
        """From the start of the step."""
        if not self._seconds:
            for event in self._events:
                event.synchronize()
            origin = self._events[0]
            self._seconds = tuple(origin.elapsed_time(event) / 1e3 for event in self._events)
            self._events = []
        return self._seconds


def streams_of(plan: Plan, world_rank: int, device: torch.device) -> Streams:
    """Of whatever device it is."""
    if device.type != "cuda":
        return CpuStreams()
    return CudaStreams(device, rank_name(world_rank, plan.grid), plan.options.deadline_seconds)
