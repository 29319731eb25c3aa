"""Memory of every rank over a step: the most that any interleaving of the streams can hold.

A buffer is taken when the first instruction that writes it is issued, and given back when every
instruction that uses it is over. Programs are issued by one thread, which waits for compute and
for nothing else, so a SEND may still hold its buffer many compute instructions later if its
receiver is late: it does until an instruction that the partial order puts behind it. State and the
pools of gather and gradient buffers are there all the time, a pool's buffers as large as the
largest unit they hold. This module knows sizes and lifetimes. It does not know time, nor what an
allocator reserves beyond what is asked of it.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from planner.graph import DTYPE_BYTES
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Instruction, Opcode, Plan, Unit
from planner.simulate.types import MemoryByClass

__all__ = ["BufferSizes", "peak_memory", "resident_memory"]

Counts = NDArray[np.int64]
_LOSS_BYTES = 4
_RESIDENT = ("shard:", "weights:", "sum:")


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSizes:
    """Bytes of buffers by name, for one plan."""

    tensors: dict[str, int]
    batch: dict[str, int]
    saved: dict[int, int]
    """By stage."""
    units: dict[str, int]
    """Whole, unpadded."""
    parts: dict[str, int]
    """This rank's part of a unit: the whole where nothing is partitioned."""

    @classmethod
    def of(cls, plan: Plan) -> "BufferSizes":
        return cls(
            tensors={tensor.name: tensor.num_bytes for tensor in plan.tensors},
            batch={key.name: key.num_bytes for key in plan.batch},
            saved={stage.index: stage.saved_bytes for stage in plan.stages},
            units={u.name: u.num_elements * DTYPE_BYTES[u.dtype] for u in plan.units},
            parts={u.name: _part_elements(plan, u) * DTYPE_BYTES[u.dtype] for u in plan.units},
        )

    def __getitem__(self, buffer: str) -> int:
        """Bytes of a buffer that comes and goes; 0 for state and pools, always there."""
        kind, _, rest = buffer.rpartition(":")
        name = rest.rpartition(".")[0]
        match kind:
            case "":
                return self.tensors.get(name, _LOSS_BYTES)
            case "gradient":
                return self.tensors[name]
            case "batch":
                return self.batch[name]
            case "saved":
                return self.saved[int(name)]
            case "part":
                return self.units[name]
            case "reduced":
                return self.parts[rest]
        return 0


def peak_memory(plan: Plan) -> tuple[MemoryByClass, ...]:
    """What each pipeline rank can hold at worst, at the compute instruction where it is most."""
    sizes = BufferSizes.of(plan)
    order = partial_order(plan, issue_order=True)
    behind = _first_compute_behind(plan, order)
    return tuple(
        _rank_peak(plan, rank, sizes, behind[np.array(order.task_of[rank], dtype=int), rank])
        for rank in range(plan.num_pipeline_ranks)
    )


def _first_compute_behind(plan: Plan, order: PartialOrder) -> Counts:
    """Per task and rank: position, among the rank's compute, of the first that waits for the task.

    The number of the rank's compute instructions where none does.
    """
    positions = [_compute_positions(program) for program in plan.programs]
    ends = [position[-1] if len(position) else 0 for position in positions]
    found = np.tile(np.array(ends, dtype=np.int64), (len(order.members), 1))
    reached = found.copy()
    followers = order.followers()
    for task in reversed(order.sorted_tasks()):
        if followers[task]:
            reached[followers[task]].min(axis=0, out=found[task])
        reached[task] = found[task]
        for rank, index in order.members[task]:
            if plan.programs[rank][index].stream == "compute":
                reached[task, rank] = positions[rank][index]
    return found


def _compute_positions(program: tuple[Instruction, ...]) -> Counts:
    """Per instruction, how many compute instructions stand before it; the total at the end."""
    compute = [instruction.stream == "compute" for instruction in program]
    return np.concatenate(([0], np.cumsum(compute, dtype=np.int64)))


def _rank_peak(plan: Plan, rank: int, sizes: BufferSizes, behind: Counts) -> MemoryByClass:
    program = plan.programs[rank]
    positions = _compute_positions(program)
    taken: dict[str, int] = {}
    given_back: dict[str, int] = {}
    transient = np.zeros(positions[-1] + 1, dtype=np.int64)
    for index, instruction in enumerate(program):
        position, made = int(positions[index]), 0
        for buffer in instruction.writes:
            if buffer not in taken and not buffer.startswith(_RESIDENT):
                taken[buffer] = position
                made += 0 if buffer.startswith("saved:") else sizes[buffer]
        last = position if instruction.stream == "compute" else int(behind[index]) - 1
        for buffer in (*instruction.reads, *instruction.writes):
            given_back[buffer] = max(last, position, given_back.get(buffer, 0))
        if instruction.stream == "compute":
            # What a stage makes for others is part of its transient peak; what it saves is not.
            transient[position] = max(0, _transient_bytes(plan, instruction) - made)
    resident = asdict(resident_memory(plan, rank))
    held = {name: np.full(len(transient) + 1, value) for name, value in resident.items()}
    changes = {name: np.zeros(len(transient) + 1, dtype=np.int64) for name in resident}
    for buffer, position in taken.items():
        changes[_class_of(buffer)][position] += sizes[buffer]
        changes[_class_of(buffer)][given_back[buffer] + 1] -= sizes[buffer]
    for name, change in changes.items():
        held[name] += np.cumsum(change)
    held["transient"][:-1] = transient
    peak = int(np.argmax(sum(held.values())))
    return MemoryByClass(**{name: int(values[peak]) for name, values in held.items()})


def resident_memory(plan: Plan, rank: int) -> MemoryByClass:
    """What a rank holds through the whole step: state, and pools of buffers."""
    weights = optimizer = 0
    updated = {i.unit for i in plan.programs[rank] if i.opcode is Opcode.UPDATE}
    for unit in plan.units:
        if rank in unit.ranks:
            num_bytes = _part_elements(plan, unit) * DTYPE_BYTES[unit.dtype]
            weights += num_bytes
            optimizer += num_bytes * plan.options.optimizer_slots if unit.name in updated else 0
    return MemoryByClass(
        weights=weights,
        optimizer=optimizer,
        gradients=_pool_bytes(plan, rank, "sum:"),
        buffers=_pool_bytes(plan, rank, "weights:") if plan.partition else 0,
    )


def _part_elements(plan: Plan, unit: Unit) -> int:
    return -(-unit.num_elements // plan.num_replicas) if plan.partition else unit.num_elements


def _pool_bytes(plan: Plan, rank: int, prefix: str) -> int:
    """Buffers of the pools that begin with `prefix`, each as large as its pool's largest unit."""
    units = {u.name: u.num_elements * DTYPE_BYTES[u.dtype] for u in plan.units}
    buffers: dict[str, set[str]] = defaultdict(set)
    largest: dict[str, int] = defaultdict(int)
    for instruction in plan.programs[rank]:
        if instruction.unit is None:
            continue
        for buffer in (*instruction.reads, *instruction.writes):
            if buffer.startswith(prefix):
                pool = buffer.rpartition(".")[0]
                buffers[pool].add(buffer)
                largest[pool] = max(largest[pool], units[instruction.unit])
    return sum(len(names) * largest[pool] for pool, names in buffers.items())


def _class_of(buffer: str) -> str:
    if buffer.startswith("saved:"):
        return "activations"
    return "gradients" if buffer.startswith(("part:", "reduced:")) else "stored_inputs"


def _transient_bytes(plan: Plan, instruction: Instruction) -> int:
    match instruction.opcode:
        case Opcode.FORWARD:
            return plan.stages[instruction.stage or 0].forward_transient_bytes
        case Opcode.RECOMPUTE:
            return plan.stages[instruction.stage or 0].recompute_transient_bytes
        case Opcode.BACKWARD:
            return plan.stages[instruction.stage or 0].backward_transient_bytes
    return 0
