"""What each task takes: seconds of its own, or bytes over a path that others may share.

Compute takes what the plan's stages predict; updates, copies and reads what `planner.cost` says for
the bytes. Replicas are alike, so one stands for all; what waits for all of them goes at the pace of
the slowest device. This module does not know when anything starts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.cluster.types import Cluster, Device
from planner.cost import copy_seconds, read_seconds, update_seconds
from planner.graph import DTYPE_BYTES
from planner.plan.dependencies import Cell, PartialOrder
from planner.plan.names import buffer_key
from planner.plan.types import Instruction, Opcode, Plan, Unit
from planner.simulate.links import Links, Path

__all__ = ["Durations", "Work"]

_COPIES = (Opcode.LOAD, Opcode.FETCH, Opcode.EVICT, Opcode.SAVE)
_VERDICT_BYTES = 8
"""Of CHECK_FINITE or CLIP: one number, added up over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one task takes."""

    seconds: float = 0.0
    path: Path | None = None
    """Where it moves bytes that others' bytes can slow; the seconds then follow from those."""
    num_bytes: float = 0.0
    """Out of each member of the path."""
    then: "Work | None" = None
    """What it moves over another path once all of that has arrived."""

    def legs(self) -> Iterator["Work"]:
        """Itself, and what follows."""
        leg: Work | None = self
        while leg is not None:
            yield leg
            leg = leg.then


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Look-up of the work of one plan's tasks on one cluster."""

    plan: Plan
    cluster: Cluster

    @cached_property
    def links(self) -> Links:
        return Links(cluster=self.cluster, grid=self.plan.grid)

    def works(self, order: PartialOrder) -> list[Work]:
        """Per task. Tasks that take the same share one object."""
        programs = self.plan.programs
        known: dict[tuple[object, ...], Work] = {}
        found = []
        for cells in order.members:
            rank, index = cells[0]
            instruction = programs[rank][index]
            opcode, key = instruction.opcode, (rank, instruction.stage, instruction.unit)
            what: tuple[object, ...]
            if opcode is Opcode.SEND:
                what = (rank, instruction.peer, _tensor(instruction.reads[0]))
            elif opcode in _COPIES:
                what = (opcode, *key, tuple(map(buffer_key, instruction.writes)))
            else:
                what = (opcode, *key)
            work = known.get(what)
            if work is None:
                work = known[what] = self._work(cells, instruction)
            found.append(work)
        return found

    def tensor_bytes(self, buffer: str) -> int:
        """Bytes of a boundary tensor or its gradient, by buffer name."""
        return self._tensors[_tensor(buffer)]

    def issue_seconds(self, rank: int) -> float:
        """Host time that a pipeline rank takes to issue one instruction."""
        return max(device.instruction_overhead_seconds for device in self._devices[rank])

    def _work(self, cells: tuple[Cell, ...], instruction: Instruction) -> Work:
        rank, stages = cells[0][0], self.plan.stages
        match instruction.opcode:
            case Opcode.FORWARD:
                return Work(seconds=stages[instruction.stage or 0].forward_seconds)
            case Opcode.RECOMPUTE:
                stage = stages[instruction.stage or 0]
                again = stage.recompute_seconds
                return Work(seconds=stage.forward_seconds if again is None else again)
            case Opcode.BACKWARD:
                return Work(seconds=stages[instruction.stage or 0].backward_seconds)
            case Opcode.BACKWARD_INPUT:
                stage = stages[instruction.stage or 0]
                return Work(seconds=stage.backward_seconds - stage.backward_weight_seconds)
            case Opcode.BACKWARD_WEIGHT:
                return Work(seconds=stages[instruction.stage or 0].backward_weight_seconds)
            case Opcode.SEND:
                num_bytes = self.tensor_bytes(instruction.reads[0])
                return Work(path=self.links.transfer(rank, cells[1][0]), num_bytes=num_bytes)
            case Opcode.LOAD | Opcode.FETCH | Opcode.EVICT | Opcode.SAVE:
                return Work(seconds=self._host_seconds(rank, instruction))
            case Opcode.GATHER | Opcode.REDUCE | Opcode.REDUCE_TIED | Opcode.UPDATE:
                return self._unit_work(rank, instruction)
            case Opcode.CHECK_FINITE | Opcode.CLIP:
                return Work(seconds=self._verdict_seconds(cells))
        return Work()

    def _unit_work(self, rank: int, instruction: Instruction) -> Work:
        unit, parts = self._units[instruction.unit or ""], self.plan.num_parts
        part = -(-unit.num_elements // parts)
        divided = self.plan.divides_gradients
        gathers = instruction.opcode is Opcode.GATHER
        element_bytes = DTYPE_BYTES[unit.weights_dtype if gathers else unit.dtype]
        num_bytes = unit.num_elements * element_bytes
        match instruction.opcode:
            case Opcode.GATHER if parts == 1:  # of the whole unit
                return Work(seconds=max(copy_seconds(num_bytes, d) for d in self._devices[rank]))
            case Opcode.GATHER:
                leaving = num_bytes * (parts - 1) / parts
                path = self.links.over_parts(rank, leaving, num_passes=1)
                return Work(path=path, num_bytes=leaving)
            case Opcode.REDUCE:
                return (
                    self._sum_in_parts(rank, num_bytes) if divided else self._sum(rank, num_bytes)
                )
            case Opcode.REDUCE_TIED:
                size = len(unit.ranks)
                reduced = part if divided else unit.num_elements
                leaving = 2 * reduced * element_bytes * (size - 1) / size
                path = self.links.over_ranks(unit.ranks, leaving, num_passes=2)
                return Work(path=path, num_bytes=leaving)
        slots, on_host = self.plan.options.optimizer_slots, self.plan.options.update_on_host
        return Work(
            seconds=max(
                update_seconds(part, device, slots, element_bytes=element_bytes)
                for device in (self._updaters if on_host else self._devices)[rank]
            )
        )

    def _sum(self, rank: int, num_bytes: int) -> Work:
        """Of a gradient of so many bytes, over all replicas."""
        replicas = self.plan.num_replicas
        leaving = 2 * (num_bytes * (replicas - 1) / replicas)
        path = self.links.over_replicas(rank, leaving, num_passes=2)
        return Work(path=path, num_bytes=leaving)

    def _sum_in_parts(self, rank: int, num_bytes: int) -> Work:
        """The same where each replica gets a part: inside its group, then over the groups."""
        parts = self.plan.num_parts
        groups, over = self.plan.num_replicas // parts, None
        if groups > 1:
            leaving = 2 * (num_bytes / parts * (groups - 1) / groups)
            path = self.links.over_groups(rank, leaving, num_passes=2)
            over = Work(path=path, num_bytes=leaving)
        leaving = num_bytes * (parts - 1) / parts
        path = self.links.over_parts(rank, leaving, num_passes=1)
        return Work(path=path, num_bytes=leaving, then=over)

    def _host_seconds(self, rank: int, instruction: Instruction) -> float:
        """A copy between a device and its host's memory: bytes / bandwidth."""
        bandwidths = [d.host_bandwidth for d in self._devices[rank] if d.host_bandwidth is not None]
        return self._bytes(rank, instruction.writes) / min(bandwidths, default=float("inf"))

    def _verdict_seconds(self, cells: tuple[Cell, ...]) -> float:
        """Every rank reads its gradients; a number of each is then added up over all of them."""
        reading = 0.0
        for rank, index in cells:
            num_bytes = self._bytes(rank, self.plan.programs[rank][index].reads)
            for device in self._devices[rank]:
                reading = max(reading, read_seconds(num_bytes, device))
        size = self.plan.world_size
        leaving = 2 * _VERDICT_BYTES * (size - 1) / size
        path = self.links.over_all(leaving, num_passes=2)
        return reading + path.latency_seconds + leaving / path.rate

    def _bytes(self, rank: int, buffers: Iterable[str]) -> int:
        return sum(self._buffers[rank][buffer_key(buffer)] for buffer in buffers)

    @cached_property
    def _buffers(self) -> list[dict[str, int]]:
        return [{buffer.name: buffer.num_bytes for buffer in rank} for rank in self.plan.buffers]

    @cached_property
    def _devices(self) -> list[list[Device]]:
        """Per pipeline rank: the kinds of device that its replicas have."""
        return self._by_rank([host.device for host in self.cluster.hosts])

    @cached_property
    def _updaters(self) -> list[list[Device]]:
        """The same of what updates on their hosts."""
        return self._by_rank([host.updater for host in self.cluster.hosts])

    def _by_rank(self, of_hosts: Sequence[Device]) -> list[list[Device]]:
        hosts = zip(of_hosts, self.cluster.hosts, strict=True)
        everyone = [device for device, host in hosts for _ in range(host.num_devices)]
        found = []
        for rank in range(self.plan.num_pipeline_ranks):
            replicas = (everyone[place] for place in self.plan.grid.replicas_of(rank))
            found.append(list({id(device): device for device in replicas}.values()))
        return found

    @cached_property
    def _tensors(self) -> dict[str, int]:
        return {tensor.name: tensor.num_bytes for tensor in self.plan.tensors}

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.plan.units}


def _tensor(buffer: str) -> str:
    return buffer.removeprefix("gradient:").rpartition(".")[0]
