"""Memory of every rank over a step: the most that any interleaving of the streams can hold.

A buffer is taken when the first instruction that writes it is issued, and given back when every
instruction that uses it is over; RELEASE ends such a life, FETCH begins another. Memory grows only
when something is issued, so it is enough to look at the moment of each issue. Whatever the partial
order does not put before that moment may still be running, on some interleaving all of it at once:
so the bound of each moment is reached, and the largest of them is the exact worst case. State and
the pools of gather and gradient buffers are there all the time, unless the plan offloads the state.
This module knows sizes and lifetimes. It does not know time, nor what an allocator reserves beyond
what is asked of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.names import buffer_key, kind_of
from planner.plan.types import Instruction, Opcode, Plan, StagePlan
from planner.schedules import Schedule
from planner.simulate.types import MemoryByClass

__all__ = [
    "Lives", "Moment", "buffer_lives", "class_of", "host_memory", "peak_memory", "resident_memory",
    "transient_bytes", "worst_moments",
]  # fmt: skip

_RANKS_AT_ONCE = 64
"""Columns of the table that `_ends` fills: 256 bytes for each task."""
_NEVER = int(np.iinfo(np.int32).max)
_Ints = NDArray[np.int32]
_CLASSES = {
    "weights": "buffers",
    "sum": "gradients",
    "part": "gradients",
    "staging": "gradients",
    "reduced": "gradients",
    "shard": "weights",
    "moments": "optimizer",
    "saved": "activations",
    "square": "gradients",
    "clip": "gradients",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When a rank may hold the most."""

    index: int
    """Of the instruction that is issued then."""
    memory: MemoryByClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """Of each buffer of one rank that comes and goes, each time that it does: a row."""

    names: list[str]
    begins: list[int]
    """Index of the instruction at whose issue it is taken."""
    ends: list[int]
    """Index of the first instruction at whose issue it has been given back; the length of the
    program if there is none."""
    num_bytes: list[int]


def class_of(buffer: str) -> str:
    """The field of MemoryByClass that a buffer on the device counts to."""
    if buffer in ("finite", "scale"):
        return "gradients"
    return _CLASSES.get(kind_of(buffer), "stored_inputs")


def peak_memory(plan: Plan, order: PartialOrder | None = None) -> tuple[MemoryByClass, ...]:
    """What each pipeline rank can hold at worst, at the moment when it is most."""
    return tuple(moment.memory for moment in worst_moments(plan, order))


def worst_moments(plan: Plan, order: PartialOrder | None = None) -> tuple[Moment, ...]:
    """The worst moment of each pipeline rank; `order` is the plan's, if it is known already."""
    ends = _ends(plan, order or partial_order(plan))
    return tuple(_worst_moment(plan, rank, ends[rank]) for rank in range(plan.num_pipeline_ranks))


def resident_memory(plan: Plan, rank: int) -> MemoryByClass:
    """What a rank holds through the whole step: state, unless offloaded, and pools of buffers.

    Buffers of modules count with the weights.
    """
    found = asdict(MemoryByClass())
    updated = {i.unit for i in plan.programs[rank] if i.opcode is Opcode.UPDATE}
    kinds = _resident_kinds(plan)
    masters = {unit.name for unit in plan.units if unit.compute_dtype}
    for buffer in plan.buffers[rank]:
        kind, _, unit = buffer.name.partition(":")
        if kind not in kinds or (kind == "shard" and not plan.gathers and unit not in masters):
            continue  # weights in place are the shard, but where that is their master
        if kind == "moments" and unit not in updated and plan.schedule is not Schedule.FORWARD:
            continue
        in_place = kind == "weights" and not plan.gathers
        found["weights" if in_place else _CLASSES[kind]] += buffer.num_bytes
    found["weights"] += plan.module_buffer_bytes
    return MemoryByClass(**found)


def host_memory(plan: Plan) -> tuple[int, ...]:
    """Bytes of host memory that each pipeline rank's copies of buffers take at most.

    Where every step leaves a checkpoint, the one before stays until the step's own is complete.
    What updates on the host make for themselves counts, one update at a time.
    """
    found = []
    for rank, table in enumerate(plan.buffers):
        num_bytes = {buffer.name: buffer.num_bytes for buffer in table}
        used, written = set[str](), set[str]()
        for programs in (plan.programs, plan.evaluation):
            for program in programs[rank : rank + 1]:
                for instruction in program:
                    used.update((*instruction.reads, *instruction.writes))
                    written.update(instruction.writes)
        hosts = [name for name in used if name.startswith("host:")]
        if plan.options.save:
            hosts += [name for name in written if _in_checkpoint(name)]
        made = [u.update_transient_bytes for u in plan.units if rank in u.ranks and u.trainable]
        found.append(sum(num_bytes[buffer_key(name)] for name in hosts))
        found[-1] += max(made, default=0) * plan.options.update_on_host
    return tuple(found)


def transient_bytes(plan: Plan, rank: int) -> list[int]:
    """What each instruction takes and gives back while it runs, outputs included."""
    on_device = not plan.options.update_on_host
    of_units = {unit.name: unit.update_transient_bytes * on_device for unit in plan.units}
    return [_transient(plan.stages, of_units, i) for i in plan.programs[rank]]


def _transient(
    stages: Sequence[StagePlan], of_units: Mapping[str, int], instruction: Instruction
) -> int:
    match instruction.opcode:
        case Opcode.FORWARD:
            return stages[instruction.stage or 0].forward_transient_bytes
        case Opcode.RECOMPUTE:
            return stages[instruction.stage or 0].recompute_transient_bytes
        case Opcode.BACKWARD | Opcode.BACKWARD_INPUT | Opcode.BACKWARD_WEIGHT:
            return stages[instruction.stage or 0].backward_transient_bytes
        case Opcode.UPDATE:
            return of_units[instruction.unit or ""]
    return 0


def buffer_lives(plan: Plan, rank: int, ends: Sequence[int] | None = None) -> Lives:
    """When each buffer that comes and goes is taken and given back.

    `ends` tells, per instruction, at which issue it is surely over. Without it a life's end is the
    index after its last use: what a program in which nothing overlaps would need.
    """
    program = plan.programs[rank]
    sizes = {buffer.name: buffer.num_bytes for buffer in plan.buffers[rank]}
    elsewhere = {*_resident_kinds(plan), "host"}
    lives = Lives(names=[], begins=[], ends=[], num_bytes=[])
    lasts, current = lives.ends, dict[str, int]()
    over = ends or range(1, len(program) + 1)
    for index, instruction in enumerate(program):
        opcode, writes = instruction.opcode, instruction.writes
        if opcode is Opcode.FETCH:
            for buffer in writes:
                current.pop(buffer, None)
        for buffer in writes:
            if buffer not in current:
                current[buffer] = -1
                if kind_of(buffer) not in elsewhere:
                    current[buffer] = len(lasts)
                    lives.names.append(buffer)
                    lives.begins.append(index)
                    lives.num_bytes.append(sizes[buffer_key(buffer)])
                    lasts.append(0)
        for buffer in (*instruction.reads, *writes):
            life = current.get(buffer, -1)
            if life >= 0 and lasts[life] < over[index]:
                lasts[life] = over[index]
        if opcode in (Opcode.REDUCE, Opcode.REDUCE_TIED) and plan.backend == "gloo":
            lives.names.append(f"staging:{instruction.unit}")
            lives.begins.append(index)
            lives.num_bytes.append(_staging_bytes(plan, instruction, sizes))
            lasts.append(over[index])
        if opcode is Opcode.RELEASE:
            for buffer in instruction.reads:
                current.pop(buffer, None)
    return lives


def _staging_bytes(plan: Plan, instruction: Instruction, sizes: Mapping[str, int]) -> int:
    """What arrives from the others while a sum by direct exchange is under way."""
    num_bytes = sizes.get(f"reduced:{instruction.unit}", 0)
    if instruction.opcode is Opcode.REDUCE_TIED:
        (unit,) = (unit for unit in plan.units if unit.name == instruction.unit)
        return (len(unit.ranks) - 1) * num_bytes
    if plan.divides_gradients:
        # The sum over groups takes less, and begins when that inside the group is over.
        return (plan.num_parts - 1) * num_bytes
    return num_bytes - num_bytes // plan.num_replicas  # each replica adds a part of it


def _worst_moment(plan: Plan, rank: int, ends: Sequence[int]) -> Moment:
    program, lives = plan.programs[rank], buffer_lives(plan, rank, ends)
    size = len(program) + 1
    begins = np.array(lives.begins, dtype=np.int64)
    num_bytes = np.array(lives.num_bytes, dtype=np.int64)
    classes = [class_of(name) for name in lives.names]
    held = {n: np.full(size, v) for n, v in asdict(resident_memory(plan, rank)).items()}
    for name in set(classes):
        mine = np.array([found == name for found in classes])
        change = np.zeros(size, dtype=np.int64)
        np.add.at(change, begins[mine], num_bytes[mine])
        np.subtract.at(change, np.array(lives.ends, dtype=np.int64)[mine], num_bytes[mine])
        held[name] += np.cumsum(change)
    # What a stage makes for others is part of its transient peak; what it saves is not.
    made = np.zeros(size, dtype=np.int64)
    others = np.array([not name.startswith("saved:") for name in lives.names], dtype=bool)
    np.add.at(made, begins[others], num_bytes[others])
    transient = np.array([*transient_bytes(plan, rank), 0], dtype=np.int64)
    held["transient"] = np.maximum(0, transient - made)
    worst = int(np.argmax(sum(held.values())))
    memory = MemoryByClass(**{name: int(values[worst]) for name, values in held.items()})
    return Moment(index=min(worst, size - 2), memory=memory)


def _ends(plan: Plan, order: PartialOrder) -> list[list[int]]:
    """Per rank and index: the first instruction of the rank at whose issue this one is surely over.

    The length of the rank's program where there is none. Found backwards: what a task waits for is
    over wherever the task itself is.
    """
    starts, items = order.predecessors.starts, order.predecessors.items
    tasks = order.sorted_tasks()
    found = []
    for first in range(0, plan.num_pipeline_ranks, _RANKS_AT_ONCE):
        ranks = range(first, min(first + _RANKS_AT_ONCE, plan.num_pipeline_ranks))
        table = np.full((len(order.members), len(ranks)), _NEVER, dtype=np.int32)
        for column, rank in enumerate(ranks):
            held = order.held_by[rank]
            # Backwards, so that the first that waits for a task is the one that stays.
            table[np.array(held.items, dtype=np.int64)[::-1], column] = held.owners()[::-1]
        rows, minimum = list(table), np.minimum
        for task in reversed(tasks):
            row = rows[task]
            for earlier in items[starts[task] : starts[task + 1]]:
                minimum(rows[earlier], row, out=rows[earlier])
        for column, rank in enumerate(ranks):
            numbers = np.array(order.task_of[rank], dtype=np.int64)
            ends: _Ints = np.minimum(table[numbers, column], len(numbers))
            found.append(ends.tolist())
    return found


def _in_checkpoint(name: str) -> bool:
    return name.startswith(("host:shard:", "host:moments:"))


def _resident_kinds(plan: Plan) -> Iterable[str]:
    return {"weights", "sum", "shard", "moments", "clip"} - set(plan.offloaded)
