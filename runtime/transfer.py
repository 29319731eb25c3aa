"""The Transport over torch.distributed: gloo by direct exchange, NCCL by its own collectives.

Knows process groups, and what their errors mean. On gloo everything is isend and irecv: its
reduce-scatter sends twice the bytes needed, its gather is slower than direct exchange, and a
collective that never ends blocks the end of the process, which a lone message does not. On NCCL
each group is a communicator with a stream of its own, made at once, and the device waits, not the
process. There the deadline is kept by who issues the work (`runtime.run_ahead`); NCCL's own
watchdog, which ends the process without a word about what it waited for, comes later.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.errors import RunError, UsageError
from planner.plan.types import Opcode, Plan
from runtime.exchange import Channel, ExchangeTransport, Wire
from runtime.group_wire import GroupWire
from runtime.meeting import meeting_store
from runtime.ranks import rank_name
from runtime.torch_errors import first_line
from runtime.transport import Pending

__all__ = ["DistributedTransport", "initialise"]

_WATCHDOG_DEADLINES = 2
"""After so many deadlines of the plan NCCL's watchdog ends the process."""


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
    # Every pair has a group for each direction: that its messages keep their order is intended.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    try:
        dist.init_process_group(
            plan.backend,
            store=meeting_store(world_rank, world_size, _timeout(plan)),
            rank=world_rank,
            world_size=world_size,
            timeout=_timeout(plan),
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
        self._device = device
        self._leaves_job = leaves_job
        self._library = plan.backend == "nccl"
        self._wires: dict[Channel, GroupWire] = {}
        for channel in _channels(plan):  # every rank must help to make every group
            group = dist.new_group(
                sorted(channel.members),
                backend=plan.backend,
                timeout=_timeout(plan),
                pg_options=_priority(plan) if self._library else None,
                device_id=device if self._library else None,
                group_desc=f"{channel.kind} {channel.members}",
            )
            if world_rank in channel.members:
                self._wires[channel] = GroupWire(plan, world_rank, channel, group)

    def _wire(self, channel: Channel) -> Wire:
        assert channel in self._wires, f"the plan has no {channel}"
        return self._wires[channel]

    def gather(self, shard: Tensor, output: Tensor, what: str) -> Pending:
        if not self._library or len(self._group) == 1:
            return super().gather(shard, output, what)
        self.traffic.add("gather", shard.nbytes * (len(self._group) - 1))
        call = _collective("all_gather_single", "all_gather_into_tensor")
        return self._inside(Channel("gather", self._group), call, output, shard, what)

    def reduce_scatter(self, source: Tensor, output: Tensor, what: str) -> Pending:
        if not self._library or len(self._replicas) == 1:
            return super().reduce_scatter(source, output, what)
        over_groups = self._bytes_of_sum(self._same_part, output)
        self.traffic.add("reduce", output.nbytes * (len(self._group) - 1) + over_groups)
        if len(self._same_part) == 1:
            return self._reduce_scatter(source, output, what)
        # Two calls of two groups, the second behind the first: on a stream of their own, so that
        # the wait between them holds up neither this thread nor the stream that computes.
        stream = self._sums
        stream.wait_stream(torch.cuda.current_stream(output.device))
        with torch.cuda.stream(stream):
            self._reduce_scatter(source, output, what).wait()
            return self._sum(Channel("reduce", self._same_part), output, what)

    def all_reduce(self, tensor: Tensor, what: str, source: Tensor | None = None) -> Pending:
        if not self._library or len(self._replicas) == 1:
            return super().all_reduce(tensor, what, source)
        if source is not None and source is not tensor:
            tensor.copy_(source)
        part = -(-tensor.nbytes // len(self._replicas))
        self.traffic.add("reduce", 2 * part * (len(self._replicas) - 1))
        return self._sum(Channel("reduce", self._replicas), tensor, what)

    def all_reduce_tied(self, tensor: Tensor, ranks: tuple[int, ...], what: str) -> Pending:
        if not self._library or len(ranks) == 1:
            return super().all_reduce_tied(tensor, ranks, what)
        part = -(-tensor.nbytes // len(ranks))
        self.traffic.add("reduce_tied", 2 * part * (len(ranks) - 1))
        return self._sum(_channel(self._plan, "tied", ranks, self._replica), tensor, what)

    def all_reduce_world(self, tensor: Tensor, what: str) -> Pending:
        if not self._library or len(self._world) == 1:
            return super().all_reduce_world(tensor, what)
        part = -(-tensor.nbytes // len(self._world))
        self.traffic.add("world", 2 * part * (len(self._world) - 1))
        return self._sum(Channel("world", self._world), tensor, what)

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

    def _reduce_scatter(self, source: Tensor, output: Tensor, what: str) -> Pending:
        """By the library, inside the partition group."""
        call = _collective("reduce_scatter_single", "reduce_scatter_tensor")
        return self._inside(Channel("reduce", self._group), call, output, source, what)

    def _inside(
        self, channel: Channel, call: Callable[..., Any], output: Tensor, given: Tensor, what: str
    ) -> Pending:
        """A collective of the library's that makes one tensor of another."""
        made, read = _real(output, given)
        return self._start(
            channel,
            what,
            lambda group: call(made, read, group=group, async_op=True),
            output,
            given,
        )

    def _sum(self, channel: Channel, tensor: Tensor, what: str) -> Pending:
        return self._start(
            channel, what, lambda group: dist.all_reduce(tensor, group=group, async_op=True), tensor
        )

    @cached_property
    def _sums(self) -> torch.cuda.Stream:
        """On which sums in groups, and then over groups, follow one another."""
        return torch.cuda.Stream(self._device)

    def _start(
        self,
        channel: Channel,
        what: str,
        call: Callable[[dist.ProcessGroup], Any],
        *tensors: Tensor,
    ) -> Pending:
        wire = self._wires[channel]
        peers = tuple(rank for rank in channel.members if rank != self._rank)
        return wire.start(call, what, peers, tensors)


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
    for rank in range(plan.num_pipeline_ranks):
        found += _replica_channels(plan, rank)
    if plan.world_size > 1:
        found.append(Channel("world", tuple(range(plan.world_size))))
    return found


def _replica_channels(plan: Plan, rank: int) -> Iterator[Channel]:
    """Among all replicas of a pipeline rank; and inside its partition groups, and over them, where
    these are not all."""
    everyone = tuple(plan.grid.replicas_of(rank))
    groups = [tuple(group) for group in plan.grid.partition_groups(rank)]
    yield from (Channel("gather", group) for group in groups if len(group) > 1)
    sums = [everyone]
    if plan.divides_gradients and len(groups) > 1:
        holders = [tuple(members) for members in plan.grid.part_holders(rank)]
        yield from (Channel("reduce", group) for group in groups)
        sums = holders
    for members in sums:
        if len(members) > 1:
            yield from (Channel(kind, members) for kind in ("reduce", "share"))


def _channel(plan: Plan, kind: str, ranks: tuple[int, ...], replica: int) -> Channel:
    return Channel(kind, tuple(plan.world_rank(rank, replica) for rank in ranks))


def _real(*tensors: Tensor) -> list[Tensor]:
    """Pairs of real numbers instead of complex ones, which not all of NCCL's collectives take."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _timeout(plan: Plan) -> timedelta:
    """Of a process group: the deadline, where torch itself keeps it."""
    times = _WATCHDOG_DEADLINES if plan.backend == "nccl" else 1
    return timedelta(seconds=times * plan.options.deadline_seconds)


def _priority(plan: Plan) -> Any:
    """Kernels of NCCL, which are few, go before those of compute."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = _timeout(plan)  # torch warns of another one than new_group's
    return options


def _collective(name: str, older: str) -> Callable[..., Any]:
    """torch.distributed's function by its present name, or by the one it had before 2.13."""
    function: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, older)
    return function
