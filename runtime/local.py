"""The Transport among threads of one process, for tests and for trying a plan without processes.

A message is copied when both its send and its receive have been posted, as on gloo: a sender that
changes a tensor too early, or two ranks that wait for each other, fail here as they would there. On
a GPU the copy comes after what both ranks had given their streams when they posted it, and what
follows a wait comes after the copy.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from planner.errors import DeadlineError, PeerLostError
from planner.layouts import Grid
from planner.plan.types import Plan
from runtime.exchange import Channel, ExchangeTransport, Wire
from runtime.ranks import rank_name
from runtime.transport import Pending, Sending

__all__ = ["LocalHub", "LocalTransport", "run_local"]

Result = TypeVar("Result")


class LocalHub:
    """Where the threads' messages meet."""

    def __init__(self, grid: Grid, deadline_seconds: float) -> None:
        self.grid = grid
        self.deadline_seconds = deadline_seconds
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        """Why the run was aborted."""
        self._sends: dict[tuple[Channel, int, int], deque[_Message]] = {}
        self._receives: dict[tuple[Channel, int, int], deque[_Message]] = {}

    def abort(self, error: BaseException) -> None:
        """Wake every wait with PeerLostError. The first error is the one that is kept."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def post_send(self, key: tuple[Channel, int, int], message: "_Message") -> None:
        with self.changed:
            self._sends.setdefault(key, deque()).append(message)
            self._match(key)

    def post_receive(self, key: tuple[Channel, int, int], message: "_Message") -> None:
        with self.changed:
            self._receives.setdefault(key, deque()).append(message)
            self._match(key)

    def _match(self, key: tuple[Channel, int, int]) -> None:
        sends, receives = self._sends.get(key), self._receives.get(key)
        if not sends or not receives:
            return
        sent, received = sends.popleft(), receives.popleft()
        tensor, source = received.tensor, sent.tensor
        assert tensor.numel() == source.numel(), (
            f"{received.what}: {sent.what} sends {source.numel()} elements, not {tensor.numel()}"
        )
        assert tensor.dtype == source.dtype, f"{received.what}: {source.dtype}, not {tensor.dtype}"
        for each in (sent, received):
            _follow(each.ready)
        tensor.view(-1).copy_(source.view(-1))
        sent.done, received.done = _passed(source), _passed(tensor)
        sent.over = received.over = True
        self.changed.notify_all()


class _Message:
    """One end of a message."""

    def __init__(self, hub: LocalHub, tensor: Tensor, what: str, rank: int, peer: int) -> None:
        self.tensor = tensor
        self.what = what
        self.ready = _passed(tensor)
        """What this end was given before it."""
        self.over = False
        """Whether it has been copied, or is being copied by the device."""
        self.done: torch.cuda.Event | None = None
        self._hub = hub
        self._rank = rank
        self._peer = peer

    def wait(self) -> None:
        hub = self._hub
        here, peer = (rank_name(r, hub.grid) for r in (self._rank, self._peer))
        with hub.changed:
            woken = hub.changed.wait_for(lambda: self.over or hub.error, hub.deadline_seconds)
            if self.over:
                self.follow()
                return
            if not woken:
                raise DeadlineError(
                    f"{here}: {self.what}: no answer from {peer} within the deadline of "
                    f"{hub.deadline_seconds:g} s",
                    hint="see what that rank is doing",
                )
        raise PeerLostError(f"{here}: {self.what}: the run was ended by another rank: {hub.error}")

    def follow(self) -> None:
        _follow(self.done)

    def is_over(self) -> bool:
        return self.over and (self.done is None or self.done.query())


def _passed(tensor: Tensor) -> torch.cuda.Event | None:
    """An event behind what the tensor's device has been given by this thread; None on a CPU."""
    if not tensor.is_cuda:
        return None
    with torch.cuda.device(tensor.device):
        event = torch.cuda.Event()
        event.record()
        return event


def _follow(event: torch.cuda.Event | None) -> None:
    """What its device is given by this thread from now on comes after the event."""
    if event is not None:
        torch.cuda.current_stream(event.device).wait_event(event)


class _LocalWire:
    def __init__(self, hub: LocalHub, channel: Channel, rank: int) -> None:
        self._hub = hub
        self._channel = channel
        self._rank = rank

    def send(self, peer: int, tensor: Tensor, what: str) -> Sending:
        message = _Message(self._hub, tensor, what, self._rank, peer)
        self._hub.post_send((self._channel, self._rank, peer), message)
        return message

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        message = _Message(self._hub, tensor, what, self._rank, peer)
        self._hub.post_receive((self._channel, peer, self._rank), message)
        return message


class LocalTransport(ExchangeTransport):
    """One rank's end of a hub."""

    def __init__(self, hub: LocalHub, world_rank: int) -> None:
        super().__init__(hub.grid, world_rank)
        self._hub = hub

    def _wire(self, channel: Channel) -> Wire:
        return _LocalWire(self._hub, channel, self._rank)


def run_local(plan: Plan, function: Callable[[LocalTransport, int], Result]) -> list[Result]:
    """Run `function(transport, world_rank)` for every rank, each in a thread of its own.

    Returns the results by world rank. Raises the first error of any rank: the original one, not
    those that followed from it. After an error the other ranks have the plan's deadline to end.
    """
    hub = LocalHub(plan.grid, plan.options.deadline_seconds)
    results: dict[int, Result] = {}

    def run(world_rank: int) -> None:
        transport = LocalTransport(hub, world_rank)
        try:
            result = function(transport, world_rank)
            with hub.changed:
                results[world_rank] = result
                hub.changed.notify_all()
        except BaseException as error:
            hub.abort(error)
        finally:
            transport.close()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(plan.world_size)
    ]
    for thread in threads:
        thread.start()
    with hub.changed:
        hub.changed.wait_for(lambda: hub.error or len(results) == plan.world_size)
    for thread in threads:
        thread.join(hub.deadline_seconds)
    if hub.error is not None:
        raise hub.error
    return [results[rank] for rank in range(plan.world_size)]
