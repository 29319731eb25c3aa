"""Messages and collectives of one process group of torch.distributed.

Knows Works: how one is started, waited for and held, and what its errors mean. It does not know
which group is for what.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.errors import RunError
from planner.plan.types import Plan
from runtime.exchange import Channel
from runtime.ranks import rank_name
from runtime.torch_errors import run_error
from runtime.transport import Pending, Sending

__all__ = ["GroupWire"]

_GLOO_TYPES = frozenset(
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex
)
_NCCL_TYPES = frozenset(
    (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
     torch.float32, torch.float64, torch.bool)
)  # fmt: skip
"""Of torch's ProcessGroupNCCL.cpp, without the 8-bit floats. Others travel as bytes."""


class GroupWire:
    """One process group.

    Messages go straight to it: dist.isend checks its arguments for longer than gloo takes to post
    a small message.
    """

    def __init__(
        self, plan: Plan, world_rank: int, channel: Channel, group: dist.ProcessGroup
    ) -> None:
        self.group = group
        self._places = {rank: place for place, rank in enumerate(sorted(channel.members))}
        self._types = _NCCL_TYPES if plan.backend == "nccl" else _GLOO_TYPES
        self.num_pending = 0
        """Messages not known to be over."""
        self._plan = plan
        self._rank = world_rank

    def send(self, peer: int, tensor: Tensor, what: str) -> Sending:
        sent = tensor if tensor.dtype in self._types else _in_other_type(tensor)
        try:
            work = self.group.send([sent], self._places[peer], 0)
        except RuntimeError as error:
            raise self.error(error, what, (peer,)) from error
        return _Started(self, work, what, (peer,), (tensor,))

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        room = tensor if tensor.dtype in self._types else _in_other_type(tensor)
        try:
            work = self.group.recv([room], self._places[peer], 0)
        except RuntimeError as error:
            raise self.error(error, what, (peer,)) from error
        return _Started(self, work, what, (peer,), (tensor,))

    def start(
        self,
        call: Callable[[dist.ProcessGroup], Any],
        what: str,
        peers: tuple[int, ...],
        tensors: tuple[Tensor, ...],
    ) -> Sending:
        """A collective of the library's own, on these tensors."""
        try:
            work = call(self.group)
        except RuntimeError as error:
            raise self.error(error, what, peers) from error
        return _Started(self, work, what, peers, tensors)

    def error(self, error: RuntimeError, what: str, peers: tuple[int, ...]) -> RunError:
        names = ", ".join(rank_name(peer, self._plan.grid) for peer in peers)
        return run_error(error, self._plan, self._rank, what, names)


def _in_other_type(tensor: Tensor) -> Tensor:
    """The same memory in a type that messages may have."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor.view(-1).view(torch.uint8)


class _Started:
    """A message under way. Holds its Work (dropping a receive's cancels it) and its tensor."""

    __slots__ = ("_peers", "_tensors", "_what", "_wire", "_work")

    def __init__(
        self,
        wire: GroupWire,
        work: dist.Work,
        what: str,
        peers: tuple[int, ...],
        tensors: tuple[Tensor, ...],
    ) -> None:
        wire.num_pending += 1
        self._wire = wire
        self._work: dist.Work | None = work
        self._what = what
        self._peers = peers
        self._tensors = tensors

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()  # without a limit of its own: the group's is the deadline
        except RuntimeError as error:
            raise self._wire.error(error, self._what, self._peers) from error
        self._work = None
        self._tensors = ()
        self._wire.num_pending -= 1

    def follow(self) -> None:
        """On NCCL only: on gloo a wait blocks. The tensors are still held, though torch has let go
        of them."""
        if self._work is not None:
            self._work.wait()

    def is_over(self) -> bool:
        return self._work is None or self._work.is_completed()
