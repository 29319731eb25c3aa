"""The partial order of a plan: what each instruction waits for.

An instruction runs when it has been issued and its predecessor in its stream is over. It is issued
when everything before it has been issued, every compute instruction before it is over, and the
conflicting uses of its buffers before it are over: a reader waits for the last writer, a writer for
the last writer and every reader since. A SEND and its RECEIVE are one task, which both ends must
reach; so is a collective of several pipeline ranks. The checker, the simulator and the executor
all keep to this order (docs/decisions/0011). This module does not know durations or sizes.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.plan.types import Opcode, Plan
from planner.plan.waits import Waits

__all__ = ["Lists", "Mismatch", "PartialOrder", "partial_order"]

Cell = tuple[int, int]
"""(pipeline rank, index in its program)."""
_Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Many short lists of numbers in two long ones: a million lists would keep Python's garbage
    collector busy. Nobody changes them.
    """

    starts: list[int]
    """Where each list begins in `items`, and where the last one ends."""
    items: list[int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self.items[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))

    def lengths(self) -> _Ints:
        """Of each list."""
        starts = np.array(self.starts, dtype=np.int32)
        return starts[1:] - starts[:-1]

    def owners(self) -> _Ints:
        """Per item: the list that it is in."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.lengths())

    @classmethod
    def grouped(cls, keys: _Ints, values: _Ints, num_lists: int) -> "Lists":
        """List k holds the values whose key is k, in their order."""
        starts = np.concatenate(([0], np.cumsum(np.bincount(keys, minlength=num_lists))))
        return cls(starts=starts.tolist(), items=values[np.argsort(keys, kind="stable")].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A transfer or collective with an end missing, or with ends that disagree."""

    rank: int
    index: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialOrder:
    """Instructions of all ranks merged into tasks: most have one member, transfers two."""

    members: list[tuple[Cell, ...]]
    """Per task: its cells; the sender first."""
    task_of: list[list[int]]
    """Per rank and index: its task."""
    predecessors: Lists
    """Per task: the tasks that it waits for before it runs. One that others of them wait for may be
    left out."""
    held_by: list[Lists]
    """Per rank and index: the tasks that its issue waits for beside those that an earlier issue
    waits for. It is issued after its neighbour above and when these are over."""
    mismatches: list[Mismatch]

    def followers(self) -> Lists:
        """Per task: the tasks that wait for it."""
        earlier = np.array(self.predecessors.items, dtype=np.int32)
        return Lists.grouped(earlier, self.predecessors.owners(), len(self.members))

    def sorted_tasks(self) -> list[int]:
        """Tasks in an order in which they can run; those on or behind a cycle are left out."""
        followers = self.followers()
        starts, items = followers.starts, followers.items
        waiting = self.predecessors.lengths().tolist()
        found = [task for task, number in enumerate(waiting) if number == 0]
        for task in found:  # which grows meanwhile
            for follower in items[starts[task] : starts[task + 1]]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    found.append(follower)
        return found


def partial_order(plan: Plan) -> PartialOrder:
    """The order of all instructions of all ranks."""
    members, mismatches = _groups(plan)
    task_of = [[-1] * len(program) for program in plan.programs]
    for task, cells in enumerate(members):
        for rank, index in cells:
            task_of[rank][index] = task
    for rank, tasks in enumerate(task_of):
        for index, task in enumerate(tasks):
            if task < 0:
                tasks[index] = len(members)
                members.append(((rank, index),))
    earlier: list[_Ints] = []
    later: list[_Ints] = []
    held_by = []
    for tasks, program in zip(task_of, plan.programs, strict=True):
        waits = Waits()
        for instruction in program:
            waits.add(instruction)
        numbers = np.array(tasks, dtype=np.int32)
        earlier.append(numbers[waits.earlier])
        later.append(numbers[waits.later])
        held_by.append(Lists(starts=waits.held_starts, items=numbers[waits.held].tolist()))
    return PartialOrder(
        members=members,
        task_of=task_of,
        predecessors=Lists.grouped(
            np.concatenate([*later, np.empty(0, dtype=np.int32)]),
            np.concatenate([*earlier, np.empty(0, dtype=np.int32)]),
            len(members),
        ),
        held_by=held_by,
        mismatches=mismatches,
    )


_COLLECTIVES = (Opcode.REDUCE_TIED, Opcode.CHECK_FINITE, Opcode.CLIP)
"""Of several pipeline ranks. (Replicas share programs, so theirs need no matching.)"""


def _groups(plan: Plan) -> tuple[list[tuple[Cell, ...]], list[Mismatch]]:
    """Instructions that run as one, and those that lack a partner.

    The k-th SEND from one rank to another goes with the k-th RECEIVE there from it; the k-th
    collective of its kind and unit on one rank with the k-th on each other rank concerned.
    """
    sends: dict[Cell, list[int]] = defaultdict(list)
    receives: dict[Cell, list[int]] = defaultdict(list)
    collectives: dict[tuple[Opcode, str | None], dict[int, list[int]]] = {}
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            opcode = instruction.opcode
            if opcode is Opcode.SEND and instruction.peer is not None:
                sends[rank, instruction.peer].append(index)
            elif opcode is Opcode.RECEIVE and instruction.peer is not None:
                receives[instruction.peer, rank].append(index)
            elif opcode in _COLLECTIVES:
                calls = collectives.setdefault((opcode, instruction.unit), defaultdict(list))
                calls[rank].append(index)
    groups: list[tuple[Cell, ...]] = []
    mismatches: list[Mismatch] = []
    for pair in sorted({*sends, *receives}):
        _match_pair(plan, pair, sends[pair], receives[pair], groups, mismatches)
    unit_ranks = {unit.name: unit.ranks for unit in plan.units}
    for (opcode, unit), by_rank in collectives.items():
        wanted = unit_ranks.get(unit or "", ()) if opcode is Opcode.REDUCE_TIED else ()
        name = f"{opcode.value} of {unit}" if unit else opcode.value
        everywhere = tuple(range(plan.num_pipeline_ranks))
        _match_collective(name, by_rank, wanted or everywhere, groups, mismatches)
    return groups, mismatches


def _match_pair(
    plan: Plan,
    pair: Cell,
    sends: list[int],
    receives: list[int],
    groups: list[tuple[Cell, ...]],
    mismatches: list[Mismatch],
) -> None:
    sender, receiver = pair
    for send, receive in zip(sends, receives, strict=False):
        groups.append(((sender, send), (receiver, receive)))
        sent = plan.programs[sender][send].reads
        received = plan.programs[receiver][receive].writes
        if sent != received:
            message = f"rank {sender} sends {' '.join(sent)} where rank {receiver} expects "
            message += " ".join(received)
            mismatches.append(Mismatch(rank=receiver, index=receive, message=message))
    paired = min(len(sends), len(receives))
    for index in sends[paired:]:
        message = f"this SEND to rank {receiver} has no RECEIVE there"
        mismatches.append(Mismatch(rank=sender, index=index, message=message))
    for index in receives[paired:]:
        message = f"this RECEIVE waits for a SEND that rank {sender} never makes"
        mismatches.append(Mismatch(rank=receiver, index=index, message=message))


def _match_collective(
    name: str,
    by_rank: dict[int, list[int]],
    wanted: tuple[int, ...],
    groups: list[tuple[Cell, ...]],
    mismatches: list[Mismatch],
) -> None:
    for position in range(max(map(len, by_rank.values()))):
        group = tuple((r, calls[position]) for r, calls in by_rank.items() if position < len(calls))
        groups.append(group)
        entered = sorted(rank for rank, _ in group)
        if entered != sorted(wanted):
            message = f"{name} is entered by pipeline ranks {entered}, but {list(wanted)} must "
            message += "enter it"
            mismatches.append(Mismatch(rank=group[0][0], index=group[0][1], message=message))
