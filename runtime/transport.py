"""What the executor asks of whatever moves tensors between ranks.

Two implementations: `runtime.transfer` over torch.distributed, and `runtime.local` over queues,
which runs every rank in threads of one process. Every call returns at once; what it started is
over when `wait` of the returned Pending returns. On a GPU it is over, then, for all that the
device's current stream is given from there on. Every wait has the plan's deadline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

__all__ = ["Pending", "Sending", "Then", "Traffic", "Transport"]


class Pending(Protocol):
    """Something started that is not over yet."""

    def wait(self) -> None:
        """Block until it is over. May be called more than once.

        Raises:
            DeadlineError: it did not end within the plan's deadline.
            PeerLostError: the other end died.
        """

    def follow(self) -> None:
        """On a GPU: what the current stream is given from now on comes after it.

        Never blocks the process, and ends nothing: `wait` is still to be called, by compute.
        """


class Sending(Pending, Protocol):
    """A message on its way."""

    def is_over(self) -> bool:
        """Whether `wait` would return at once. Always false on gloo, which learns it by waiting."""


class Then:
    """A Pending with something to do at its end, by whoever waits for it first."""

    def __init__(self, pending: Pending, action: Callable[[], object]) -> None:
        self._pending = pending
        self._action: Callable[[], object] | None = action

    def wait(self) -> None:
        self._pending.wait()
        if self._action is not None:
            action, self._action = self._action, None
            action()

    def follow(self) -> None:
        """Without what is done at its end."""
        self._pending.follow()


@dataclass(slots=True)
class Traffic:
    """Calls and payload bytes that left this rank, by kind.

    Kinds: `send`, `gather`, `reduce`, `reduce_tied`, `world`.
    """

    num_calls: dict[str, int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, num_bytes: int) -> None:
        self.num_calls[kind] = self.num_calls.get(kind, 0) + 1
        self.num_bytes[kind] = self.num_bytes.get(kind, 0) + num_bytes


class Transport(Protocol):
    """Moves flat contiguous tensors whose sizes both ends know from the plan.

    `what` names the instruction in error messages ("FORWARD input h.3 of micro-batch 2").
    Tensors handed over must not be changed or freed before `wait` returns.
    """

    traffic: Traffic

    def send(self, peer: int, tensor: Tensor, what: str) -> Sending:
        """To pipeline rank `peer` of the same replica; messages of a pair keep their order."""

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        """From pipeline rank `peer` of the same replica, into `tensor`."""

    def gather(self, shard: Tensor, output: Tensor, what: str) -> Pending:
        """`output` = shards of this replica's partition group, in replica order."""

    def reduce_scatter(self, source: Tensor, output: Tensor, what: str) -> Pending:
        """`output` = this replica's part of the sum of `source` over replicas.

        The sum is taken in replica order inside each partition group, then over the groups, so it
        does not depend on who computes it. `output` may be that part of `source` itself.
        """

    def all_reduce(self, tensor: Tensor, what: str, source: Tensor | None = None) -> Pending:
        """`tensor` = the sum of `source` (of itself, where there is none) over replicas, bitwise
        equal on all of them. `source` stays as it is."""

    def all_reduce_tied(self, tensor: Tensor, ranks: tuple[int, ...], what: str) -> Pending:
        """`tensor` = its sum over these pipeline ranks of the same replica, equal on all."""

    def all_reduce_world(self, tensor: Tensor, what: str) -> Pending:
        """`tensor` = its sum over all ranks of all replicas, equal on all. For a few figures."""

    def close(self) -> None:
        """Release threads, groups and connections. Safe to call after a failure."""
