"""How long each instruction takes, and over which link it goes.

Compute takes what the plan's stages predict, collectives and updates what `planner.cost` says for
the unit's bytes. Replicas are alike, so replica 0 stands for all of them; a collective over
replicas goes at the pace of its slowest link. This module does not know when anything starts.
"""

from dataclasses import dataclass
from functools import cached_property

from planner.cluster.types import Cluster, Link
from planner.cost import (
    all_reduce_seconds,
    gather_seconds,
    reduce_scatter_seconds,
    update_seconds,
)
from planner.graph import DTYPE_BYTES
from planner.plan.types import Instruction, Opcode, Plan, Unit

__all__ = ["Durations"]


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Look-up of durations and sizes for one plan on one cluster."""

    plan: Plan
    cluster: Cluster

    def seconds(self, rank: int, instruction: Instruction) -> float:
        """Duration of anything but SEND and RECEIVE."""
        match instruction.opcode:
            case Opcode.FORWARD | Opcode.RECOMPUTE:
                return self.plan.stages[instruction.stage or 0].forward_seconds
            case Opcode.BACKWARD:
                return self.plan.stages[instruction.stage or 0].backward_seconds
            case Opcode.GATHER | Opcode.REDUCE | Opcode.REDUCE_TIED | Opcode.UPDATE:
                key = (rank, instruction.opcode, instruction.unit or "")
                if key not in self._of_units:
                    self._of_units[key] = self._unit_seconds(*key)
                return self._of_units[key]
            case _:
                return 0.0

    def link(self, rank: int, peer: int) -> Link:
        """The link between two pipeline ranks of one replica."""
        world = self.plan.world_rank
        return self.cluster.link(world(rank, 0), world(peer, 0))

    def tensor_bytes(self, buffer: str) -> int:
        """Bytes of a boundary tensor or its gradient, by buffer name."""
        return self._tensors[buffer.removeprefix("gradient:").rpartition(".")[0]]

    @cached_property
    def _of_units(self) -> dict[tuple[int, Opcode, str], float]:
        return {}

    @cached_property
    def _tensors(self) -> dict[str, int]:
        return {tensor.name: tensor.num_bytes for tensor in self.plan.tensors}

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.plan.units}

    def _unit_seconds(self, rank: int, opcode: Opcode, name: str) -> float:
        unit, num_replicas = self._units[name], self.plan.num_replicas
        world = self.plan.world_rank
        replicas = tuple(world(rank, replica) for replica in range(num_replicas))
        whole_bytes = unit.num_elements * DTYPE_BYTES[unit.dtype]
        part = -(-unit.num_elements // num_replicas) if self.plan.partition else unit.num_elements
        match opcode:
            case Opcode.GATHER:
                link = self.cluster.slowest_link(replicas)
                return gather_seconds(whole_bytes, num_replicas, link)
            case Opcode.REDUCE:
                reduce = reduce_scatter_seconds if self.plan.partition else all_reduce_seconds
                return reduce(whole_bytes, num_replicas, self.cluster.slowest_link(replicas))
            case Opcode.REDUCE_TIED:
                link = self.cluster.slowest_link(tuple(world(p, 0) for p in unit.ranks))
                part_bytes = part * DTYPE_BYTES[unit.dtype]
                return all_reduce_seconds(part_bytes, len(unit.ranks), link)
            case _:
                device = self.cluster.device(replicas[0])
                return update_seconds(part, device, self.plan.options.optimizer_slots)
