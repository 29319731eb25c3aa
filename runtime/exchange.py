"""Gathers and sums by direct exchange of messages, the same over every kind of wire.

Each member sends straight to each other member, so a gather or a scattered reduction sends
(members - 1) / members of the vector once, which is the least possible. Sums are taken in
ascending order of members, so every member gets the same bits. Receives are posted before sends.
This module knows who sends what to whom. It does not know how a message travels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from planner.layouts import Grid
from runtime.transport import Pending, Sending, Traffic
from runtime.worker import Worker

__all__ = ["Channel", "ExchangeTransport", "Joined", "Wire", "ordered_sum", "part_sizes"]


class Channel(NamedTuple):
    """A logical stream of messages. Messages of different channels never wait for each other."""

    kind: str
    """`pair` (one direction), `gather`, `reduce`, `share` (second half of all-reduce), `tied`,
    `world`."""
    members: tuple[int, ...]
    """World ranks, ascending; (source, destination) for a pair."""


class Wire(Protocol):
    """Messages between the members of one channel; messages of a pair keep their order."""

    def send(self, peer: int, tensor: Tensor, what: str) -> Sending:
        """To world rank `peer`; over when the receiver has it."""

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        """From world rank `peer`, into `tensor`."""


class Joined:
    """Several things started together; over when all are."""

    def __init__(self, parts: Iterable[Pending]) -> None:
        self._parts = list(parts)

    def wait(self) -> None:
        for part in self._parts:
            part.wait()
        self._parts.clear()  # and with them whatever they hold

    def follow(self) -> None:
        for part in self._parts:
            part.follow()


class ExchangeTransport(ABC):
    """The Transport's calls in terms of wires. Subclasses say how to open a wire."""

    def __init__(self, grid: Grid, world_rank: int) -> None:
        self.traffic = Traffic()
        self._grid = grid
        self._world = tuple(range(grid.world_size))
        self._pipeline_rank, self._replica = grid.coordinates(world_rank)
        self._rank = world_rank
        self._replicas = tuple(grid.replicas_of(self._pipeline_rank))
        group, part = divmod(self._replica, grid.num_parts)
        self._group = tuple(grid.partition_groups(self._pipeline_rank)[group])
        """Those that divide the state with this replica."""
        self._same_part = tuple(grid.part_holders(self._pipeline_rank)[part])
        """Those of the other groups with the same part of it, and this replica."""
        self._workers: dict[Channel, Worker] = {}
        self._ways_to: dict[int, tuple[int, Wire]] = {}
        """By pipeline rank: world rank, and the open wire of this direction."""
        self._ways_from: dict[int, tuple[int, Wire]] = {}

    @abstractmethod
    def _wire(self, channel: Channel) -> Wire:
        """The open wire of a channel that this rank is a member of."""

    def send(self, peer: int, tensor: Tensor, what: str) -> Sending:
        assert tensor.is_contiguous(), what
        self.traffic.add("send", tensor.nbytes)
        way = self._ways_to.get(peer)
        if way is None:
            other = self._world_rank(peer)
            way = self._ways_to[peer] = other, self._wire(Channel("pair", (self._rank, other)))
        return way[1].send(way[0], tensor, what)

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        assert tensor.is_contiguous(), what
        way = self._ways_from.get(peer)
        if way is None:
            other = self._world_rank(peer)
            way = self._ways_from[peer] = other, self._wire(Channel("pair", (other, self._rank)))
        return way[1].receive(way[0], tensor, what)

    def gather(self, shard: Tensor, output: Tensor, what: str) -> Pending:
        _check(shard, output)
        members = self._group
        _check_sizes(output, shard, len(members))
        self.traffic.add("gather", shard.nbytes * (len(members) - 1))
        parts = torch.split(output.view(-1), max(shard.numel(), 1))
        mine = parts[members.index(self._rank)] if shard.numel() else shard
        if mine.data_ptr() != shard.data_ptr():  # else it is where it belongs
            mine.copy_(shard.view(-1))
        if len(members) == 1 or not shard.numel():
            return Joined(())
        channel = Channel("gather", members)
        return self._swap(channel, parts, [shard.view(-1)] * len(members), what)

    def reduce_scatter(self, source: Tensor, output: Tensor, what: str) -> Pending:
        _check(source, output)
        members, others = self._group, self._same_part
        _check_sizes(source, output, len(members))
        if len(members) == 1 or not output.numel():
            output.copy_(source.view_as(output))
            return self._all_reduce(others, output, output, what)
        over_groups = self._bytes_of_sum(others, output)
        self.traffic.add("reduce", output.nbytes * (len(members) - 1) + over_groups)
        sent = torch.split(source.view(-1), max(output.numel(), 1))
        channel, mine = Channel("reduce", members), members.index(self._rank)
        received = self._staging(members, sent[mine])
        swap = self._swap(channel, received, sent, what)

        def finish() -> None:
            swap.wait()
            ordered_sum(received, mine, output.view(-1))
            received.clear()  # the sum over groups makes room of its own
            if len(others) > 1:
                self._begin_sum(others, output, output, what)()

        return self._run(channel, finish)

    def all_reduce(self, tensor: Tensor, what: str, source: Tensor | None = None) -> Pending:
        source = tensor if source is None else source
        _check(tensor, source)
        return self._all_reduce(self._replicas, tensor, source, what)

    def _all_reduce(
        self, members: tuple[int, ...], tensor: Tensor, source: Tensor, what: str
    ) -> Pending:
        self.traffic.add("reduce", self._bytes_of_sum(members, tensor))
        if len(members) == 1 or not tensor.numel():
            if source is not tensor:
                tensor.copy_(source)
            return Joined(())
        return self._run(Channel("reduce", members), self._begin_sum(members, tensor, source, what))

    def _bytes_of_sum(self, members: tuple[int, ...], tensor: Tensor) -> int:
        """That leave this rank where the members add up a tensor."""
        size = part_sizes(tensor.numel(), len(members))[members.index(self._rank)]
        return tensor.nbytes + size * tensor.element_size() * (len(members) - 2)

    def _begin_sum(
        self, members: tuple[int, ...], tensor: Tensor, source: Tensor, what: str
    ) -> Callable[[], None]:
        """Start `tensor` = the sum of `source` over two members or more; what is left to do."""
        sizes, place = part_sizes(tensor.numel(), len(members)), members.index(self._rank)
        parts, sent = torch.split(tensor.view(-1), sizes), torch.split(source.view(-1), sizes)
        mine = parts[place]
        share, channel = Channel("share", members), Channel("reduce", members)
        # A member sends its finished part only after it has received ours for that part, so the
        # finished parts may arrive in the very tensor that the first half is sent from.
        arriving = self._receive_from_others(share, parts, what)
        received = self._staging(members, sent[place])
        swap = self._swap(channel, received, sent, what)

        def finish() -> None:
            swap.wait()
            ordered_sum(received, place, mine)
            leaving = self._send_to_others(share, [mine] * len(members), what)
            arriving.wait()
            leaving.wait()

        return finish

    def all_reduce_tied(self, tensor: Tensor, ranks: tuple[int, ...], what: str) -> Pending:
        _check(tensor)
        self.traffic.add("reduce_tied", tensor.nbytes * (len(ranks) - 1))
        members = tuple(self._world_rank(rank) for rank in sorted(ranks))
        return self._sum_whole(Channel("tied", members), tensor, what)

    def all_reduce_world(self, tensor: Tensor, what: str) -> Pending:
        _check(tensor)
        self.traffic.add("world", tensor.nbytes * (len(self._world) - 1))
        return self._sum_whole(Channel("world", self._world), tensor, what)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _world_rank(self, pipeline_rank: int) -> int:
        return self._grid.world_rank(pipeline_rank, self._replica)

    def _staging(self, members: tuple[int, ...], mine: Tensor) -> list[Tensor]:
        """Room for every member's version of my part; my own version is already here."""
        return [mine if member == self._rank else torch.empty_like(mine) for member in members]

    def _swap(
        self, channel: Channel, received: Iterable[Tensor], sent: Iterable[Tensor], what: str
    ) -> Joined:
        """received[i] = what member i sends me; member i receives sent[i]."""
        arriving = self._receive_from_others(channel, received, what)
        return Joined((arriving, self._send_to_others(channel, sent, what)))

    def _sum_whole(self, channel: Channel, tensor: Tensor, what: str) -> Pending:
        """`tensor` = its sum over the members, each of which sends the whole to all others."""
        if len(channel.members) == 1 or not tensor.numel():
            return Joined(())
        received = [
            tensor if member == self._rank else torch.empty_like(tensor)
            for member in channel.members
        ]
        swap = self._swap(channel, received, [tensor] * len(received), what)

        def finish() -> None:
            swap.wait()
            ordered_sum(received, channel.members.index(self._rank), tensor)

        return self._run(channel, finish)

    def _receive_from_others(self, channel: Channel, into: Iterable[Tensor], what: str) -> Joined:
        wire = self._wire(channel)
        pairs = zip(channel.members, into, strict=True)
        return Joined([wire.receive(m, t, what) for m, t in pairs if m != self._rank and t.numel()])

    def _send_to_others(self, channel: Channel, sent: Iterable[Tensor], what: str) -> Joined:
        wire = self._wire(channel)
        pairs = zip(channel.members, sent, strict=True)
        return Joined([wire.send(m, t, what) for m, t in pairs if m != self._rank and t.numel()])

    def _run(self, channel: Channel, job: Callable[[], None]) -> Pending:
        """Finish in the background: the other members need not wait until this rank waits."""
        if channel not in self._workers:
            self._workers[channel] = Worker(f"{channel.kind} of rank {self._rank}")
        return _Job(self._workers[channel].submit(job))


class _Job:
    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def follow(self) -> None:
        if self._future.done():
            self._future.result()


def ordered_sum(parts: list[Tensor], mine: int, output: Tensor) -> None:
    """`output` = ((parts[0] + parts[1]) + parts[2]) + ...; at least two.

    `output` may be parts[mine], which is not changed otherwise; the others are used up.
    """
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=output)
        return
    total = parts[0 if mine == 1 else 1]
    torch.add(parts[0], parts[1], out=total)
    for part in parts[2:-1]:
        total += part
    torch.add(total, parts[-1], out=output)


def part_sizes(num_elements: int, num_parts: int) -> list[int]:
    """Sizes of consecutive parts that differ by at most one element, larger ones first."""
    size, num_larger = divmod(num_elements, num_parts)
    return [size + 1] * num_larger + [size] * (num_parts - num_larger)


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), f"a tensor of shape {tuple(tensor.shape)} is not contiguous"
        assert tensor.dtype == tensors[0].dtype, f"{tensor.dtype} meets {tensors[0].dtype}"


def _check_sizes(whole: Tensor, part: Tensor, num_parts: int) -> None:
    assert whole.numel() == part.numel() * num_parts, (
        f"{num_parts} parts of {part.numel()} elements do not make {whole.numel()}"
    )
