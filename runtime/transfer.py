"""The Transport over torch.distributed: gloo by direct exchange, NCCL by its own collectives.

Knows process groups, and what their errors mean. On gloo everything is isend and irecv: its
reduce-scatter sends twice the bytes needed, its gather is slower than direct exchange, and a
collective that never ends blocks the end of the process, which a lone message does not.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.errors import RunError, UsageError
from planner.plan.types import Opcode, Plan
from runtime.exchange import Channel, ExchangeTransport, Wire
from runtime.ranks import rank_name
from runtime.torch_errors import first_line, run_error
from runtime.transport import Pending

__all__ = ["DistributedTransport", "initialise"]


def initialise(plan: Plan) -> int:
    """Join the job that the environment describes, or that the caller has joined already; returns
    this process's world rank.

    Raises:
        UsageError: not started by a launcher, another number of processes than the plan has
            ranks, the plan's backend is not available here, or the job that was joined already is
            of another backend or gives this process another rank than the launcher.
        RunError: the other processes did not appear within the plan's deadline.
    """
    if dist.is_initialized():
        _check_joined(plan)
        return dist.get_rank()
    try:
        world_rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UsageError(
            "this process was not started by a launcher: RANK and WORLD_SIZE are not set",
            hint="start it with lga-run, or with torchrun -m runtime",
        ) from None
    _check_world_size(plan, world_size)
    if not dist.is_backend_available(plan.backend):
        raise UsageError(
            f"the plan was made for the backend {plan.backend!r}, which this torch does not have",
            hint="plan again for a cluster of this kind of machine",
        )
    try:
        dist.init_process_group(
            plan.backend, timeout=timedelta(seconds=plan.options.deadline_seconds)
        )
    except RuntimeError as error:
        raise RunError(
            f"{rank_name(world_rank, plan.grid)} could not join the other "
            f"{world_size - 1} within {plan.options.deadline_seconds:g} s: {first_line(error)}",
            hint="see whether every process was started and can reach MASTER_ADDR",
        ) from error
    return world_rank


def _check_world_size(plan: Plan, world_size: int) -> None:
    if world_size != plan.world_size:
        raise UsageError(
            f"the launcher started {world_size} processes, but the plan needs {plan.world_size} "
            f"({plan.num_pipeline_ranks} pipeline ranks x {plan.num_replicas} replicas)",
            hint=f"start {plan.world_size} processes, or plan again for {world_size} devices",
        )


def _check_joined(plan: Plan) -> None:
    """Whether the process group that the caller has set up is one for the plan."""
    _check_world_size(plan, dist.get_world_size())
    rank, launched_as = dist.get_rank(), os.environ.get("RANK", "")
    if launched_as not in ("", str(rank)):
        raise UsageError(
            f"this process is rank {rank} of the process group that is set up already, and was "
            f"launched as rank {launched_as}",
            hint="init_process_group() takes rank and world size from the launcher by itself",
        )
    device = "cuda" if plan.backend == "nccl" else "cpu"
    backends = dist.get_backend_config()
    if f"{device}:{plan.backend}" not in backends.split(","):
        raise UsageError(
            f"the process group that is set up already has the backends {backends}, and the plan "
            f"is for {plan.backend!r} on {device!r}",
            hint=f"init_process_group({plan.backend!r}), or plan for the devices that are used",
        )


class DistributedTransport(ExchangeTransport):
    """Messages over torch.distributed, which `initialise` has set up, or who calls.

    Every channel has a process group of its own, so that no transfer, and no direction of a
    pair, ever waits behind another, and so that two collectives cannot be confused.
    """

    def __init__(
        self, plan: Plan, world_rank: int, device: torch.device, *, leaves_job: bool = True
    ) -> None:
        """
        Args:
            plan: whose transfers these are.
            world_rank: of this process.
            device: where tensors are.
            leaves_job: `close` ends all of torch.distributed here, not only what this has made.
        """
        super().__init__(plan.grid, world_rank)
        self._plan = plan
        self._leaves_job = leaves_job
        self._library = plan.backend == "nccl"
        self._wires: dict[Channel, _GroupWire] = {}
        for channel in _channels(plan):  # every rank must help to make every group
            group = dist.new_group(
                sorted(channel.members),
                backend=plan.backend,
                timeout=timedelta(seconds=plan.options.deadline_seconds),
                device_id=device if self._library else None,
                group_desc=f"{channel.kind} {channel.members}",
            )
            if world_rank in channel.members:
                self._wires[channel] = _GroupWire(plan, world_rank, channel, group)

    def _wire(self, channel: Channel) -> Wire:
        assert channel in self._wires, f"the plan has no {channel}"
        return self._wires[channel]

    def gather(self, shard: Tensor, output: Tensor, what: str) -> Pending:
        if not self._library or self._num_replicas == 1:
            return super().gather(shard, output, what)
        self.traffic.add("gather", shard.nbytes * (self._num_replicas - 1))
        call = _collective("all_gather_single", "all_gather_into_tensor")
        channel = Channel("gather", self._replicas)
        return self._start(
            channel, what, lambda group: call(output, shard, group=group, async_op=True)
        )

    def reduce_scatter(self, source: Tensor, output: Tensor, what: str) -> Pending:
        if not self._library or self._num_replicas == 1:
            return super().reduce_scatter(source, output, what)
        self.traffic.add("reduce", output.nbytes * (self._num_replicas - 1))
        call = _collective("reduce_scatter_single", "reduce_scatter_tensor")
        channel = Channel("reduce", self._replicas)
        return self._start(
            channel, what, lambda group: call(output, source, group=group, async_op=True)
        )

    def all_reduce(self, tensor: Tensor, what: str, source: Tensor | None = None) -> Pending:
        if not self._library or self._num_replicas == 1:
            return super().all_reduce(tensor, what, source)
        if source is not None and source is not tensor:
            tensor.copy_(source)
        part = -(-tensor.nbytes // self._num_replicas)
        self.traffic.add("reduce", 2 * part * (self._num_replicas - 1))
        channel = Channel("reduce", self._replicas)
        return self._start(
            channel, what, lambda group: dist.all_reduce(tensor, group=group, async_op=True)
        )

    def all_reduce_tied(self, tensor: Tensor, ranks: tuple[int, ...], what: str) -> Pending:
        if not self._library or len(ranks) == 1:
            return super().all_reduce_tied(tensor, ranks, what)
        part = -(-tensor.nbytes // len(ranks))
        self.traffic.add("reduce_tied", 2 * part * (len(ranks) - 1))
        channel = _channel(self._plan, "tied", ranks, self._replica)
        return self._start(
            channel, what, lambda group: dist.all_reduce(tensor, group=group, async_op=True)
        )

    def all_reduce_world(self, tensor: Tensor, what: str) -> Pending:
        if not self._library or len(self._world) == 1:
            return super().all_reduce_world(tensor, what)
        part = -(-tensor.nbytes // len(self._world))
        self.traffic.add("world", 2 * part * (len(self._world) - 1))
        channel = Channel("world", self._world)
        return self._start(
            channel, what, lambda group: dist.all_reduce(tensor, group=group, async_op=True)
        )

    def close(self) -> None:
        """Leave the job, or what was made in it. May be called again.

        After a failure something is still under way, and taking its group down would wait for
        it: the end of the process does it then.
        """
        super().close()
        if dist.is_initialized() and not any(w.num_pending for w in self._wires.values()):
            groups = [wire.group for wire in self._wires.values()]
            for group in [None] if self._leaves_job else groups:
                with suppress(RuntimeError, ValueError):  # of a group that is gone already
                    dist.destroy_process_group(group)

    def _start(
        self, channel: Channel, what: str, call: Callable[[dist.ProcessGroup], Any]
    ) -> Pending:
        wire = self._wires[channel]
        peers = tuple(rank for rank in channel.members if rank != self._rank)
        return wire.start(call, (wire.group,), what, peers, ())


class _GroupWire:
    """One process group.

    Messages go straight to it: dist.isend checks its arguments for longer than gloo takes to post
    a small message.
    """

    def __init__(
        self, plan: Plan, world_rank: int, channel: Channel, group: dist.ProcessGroup
    ) -> None:
        self.group = group
        self._places = {rank: place for place, rank in enumerate(sorted(channel.members))}
        self.num_pending = 0
        """Messages not known to be over."""
        self._plan = plan
        self._rank = world_rank

    def send(self, peer: int, tensor: Tensor, what: str) -> Pending:
        sent = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        arguments = [sent], self._places[peer], 0
        return self.start(self.group.send, arguments, what, (peer,), (tensor,))

    def receive(self, peer: int, tensor: Tensor, what: str) -> Pending:
        room = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        arguments = [room], self._places[peer], 0
        return self.start(self.group.recv, arguments, what, (peer,), (tensor,))

    def start(
        self,
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        what: str,
        peers: tuple[int, ...],
        tensors: tuple[Tensor, ...],
    ) -> Pending:
        self.num_pending += 1
        try:
            work = call(*arguments)
        except RuntimeError as error:
            raise self.error(error, what, peers) from error
        return _Started(self, work, what, peers, tensors)

    def error(self, error: RuntimeError, what: str, peers: tuple[int, ...]) -> RunError:
        names = ", ".join(rank_name(peer, self._plan.grid) for peer in peers)
        return run_error(error, self._plan, self._rank, what, names)


class _Started:
    """A message under way. Holds its Work (dropping a receive's cancels it) and its tensor."""

    __slots__ = ("_peers", "_tensors", "_what", "_wire", "_work")

    def __init__(
        self,
        wire: _GroupWire,
        work: dist.Work,
        what: str,
        peers: tuple[int, ...],
        tensors: tuple[Tensor, ...],
    ) -> None:
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


def _channels(plan: Plan) -> list[Channel]:
    """All channels of all ranks, in one order."""
    pairs = set()
    for programs in (plan.programs, plan.evaluation):
        for rank, program in enumerate(programs):
            for instruction in program:
                if instruction.peer is not None and instruction.opcode is Opcode.SEND:
                    pairs.add((rank, instruction.peer))
                elif instruction.peer is not None and instruction.opcode is Opcode.RECEIVE:
                    pairs.add((instruction.peer, rank))
    tied = {unit.ranks for unit in plan.units if len(unit.ranks) > 1}
    found: list[Channel] = []
    for replica in range(plan.num_replicas):
        found += [_channel(plan, "pair", pair, replica) for pair in sorted(pairs)]
        found += [_channel(plan, "tied", ranks, replica) for ranks in sorted(tied)]
    if plan.num_replicas > 1:
        for rank in range(plan.num_pipeline_ranks):
            members = tuple(plan.grid.replicas_of(rank))
            found += [Channel(kind, members) for kind in ("gather", "reduce", "share")]
    if plan.world_size > 1:
        found.append(Channel("world", tuple(range(plan.world_size))))
    return found


def _channel(plan: Plan, kind: str, ranks: tuple[int, ...], replica: int) -> Channel:
    return Channel(kind, tuple(plan.world_rank(rank, replica) for rank in ranks))


def _collective(name: str, older: str) -> Callable[..., Any]:
    """torch.distributed's function by its present name, or by the one it had before 2.13."""
    function: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, older)
    return function
