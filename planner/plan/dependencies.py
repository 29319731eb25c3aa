"""The partial order of a plan: what each instruction waits for.

An instruction waits for its predecessor in its stream and for the last conflicting uses of its
buffers: a reader waits for the last writer, a writer for the last writer and every reader since. A
SEND and its RECEIVE are one transfer, which both ends must reach; so is a REDUCE_TIED on all ranks
that share the unit. The simulator and the checker both read this order; neither adds to it. This
module does not know durations or sizes.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["Mismatch", "PartialOrder", "partial_order", "predecessors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A transfer or collective with an end missing, or with ends that disagree."""

    rank: int
    index: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialOrder:
    """Instructions of all ranks merged into tasks: most have one member, transfers two."""

    members: tuple[tuple[tuple[int, int], ...], ...]
    """Per task: (rank, index in its program); the sender first."""
    task_of: tuple[tuple[int, ...], ...]
    """Per rank and index: its task."""
    predecessors: tuple[tuple[int, ...], ...]
    """Per task: the tasks that it waits for."""
    mismatches: tuple[Mismatch, ...]

    def sorted_tasks(self) -> list[int]:
        """Tasks in an order in which they can run; those on or behind a cycle are left out."""
        followers, waiting = self.followers(), [len(found) for found in self.predecessors]
        ready = deque(task for task, number in enumerate(waiting) if number == 0)
        found = []
        while ready:
            task = ready.popleft()
            found.append(task)
            for follower in followers[task]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    ready.append(follower)
        return found

    def followers(self) -> list[list[int]]:
        """Per task: the tasks that wait for it."""
        found: list[list[int]] = [[] for _ in self.members]
        for task, earlier in enumerate(self.predecessors):
            for predecessor in earlier:
                found[predecessor].append(task)
        return found


def predecessors(program: Sequence[Instruction], *, issue_order: bool = False) -> list[set[int]]:
    """For each instruction of one rank, the indices it waits for.

    With `issue_order`, one thread issues the program: compute blocks it until it is over, so
    everything behind a compute instruction waits for that one too; nothing else blocks.
    """
    last_in_stream: dict[str, int] = {}
    last_writer: dict[str, int] = {}
    readers: dict[str, list[int]] = defaultdict(list)
    found: list[set[int]] = []
    blocking: int | None = None
    for index, instruction in enumerate(program):
        waits: set[int] = set()
        if instruction.stream in last_in_stream:
            waits.add(last_in_stream[instruction.stream])
        if issue_order and blocking is not None:
            waits.add(blocking)
        for buffer in instruction.reads:
            if buffer in last_writer:
                waits.add(last_writer[buffer])
        for buffer in instruction.writes:
            waits.update(readers.pop(buffer, ()))
            if buffer in last_writer:
                waits.add(last_writer[buffer])
            last_writer[buffer] = index
        for buffer in instruction.reads:
            if buffer not in instruction.writes:
                readers[buffer].append(index)
        last_in_stream[instruction.stream] = index
        if instruction.stream == "compute":
            blocking = index
        waits.discard(index)
        found.append(waits)
    return found


def partial_order(plan: Plan, *, issue_order: bool = False) -> PartialOrder:
    """The order of all instructions of all ranks; `issue_order` as in `predecessors`."""
    groups, mismatches = _groups(plan)
    task_of = [[-1] * len(program) for program in plan.programs]
    members: list[tuple[tuple[int, int], ...]] = []
    for group in groups:
        for rank, index in group:
            task_of[rank][index] = len(members)
        members.append(group)
    for rank, tasks in enumerate(task_of):
        for index, task in enumerate(tasks):
            if task < 0:
                tasks[index] = len(members)
                members.append(((rank, index),))
    waits: list[set[int]] = [set() for _ in members]
    for rank, program in enumerate(plan.programs):
        tasks = task_of[rank]
        for index, earlier in enumerate(predecessors(program, issue_order=issue_order)):
            waits[tasks[index]].update(tasks[i] for i in earlier)
    return PartialOrder(
        members=tuple(members),
        task_of=tuple(map(tuple, task_of)),
        predecessors=tuple(tuple(sorted(tasks)) for tasks in waits),
        mismatches=tuple(mismatches),
    )


def _groups(plan: Plan) -> tuple[list[tuple[tuple[int, int], ...]], list[Mismatch]]:
    """Instructions that run as one, and those that lack a partner.

    The k-th SEND from one rank to another goes with the k-th RECEIVE there from it; the k-th
    REDUCE_TIED of a unit on one rank with the k-th on each other rank that holds it.
    """
    sends: dict[tuple[int, int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, int], list[int]] = defaultdict(list)
    tied: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            if instruction.opcode is Opcode.SEND and instruction.peer is not None:
                sends[rank, instruction.peer].append(index)
            elif instruction.opcode is Opcode.RECEIVE and instruction.peer is not None:
                receives[instruction.peer, rank].append(index)
            elif instruction.opcode is Opcode.REDUCE_TIED and instruction.unit is not None:
                tied[instruction.unit][rank].append(index)
    groups: list[tuple[tuple[int, int], ...]] = []
    mismatches: list[Mismatch] = []
    for pair in sorted({*sends, *receives}):
        _match_pair(plan, pair, sends[pair], receives[pair], groups, mismatches)
    for name, by_rank in tied.items():
        _match_tied(plan, name, by_rank, groups, mismatches)
    return groups, mismatches


def _match_pair(
    plan: Plan,
    pair: tuple[int, int],
    sends: list[int],
    receives: list[int],
    groups: list[tuple[tuple[int, int], ...]],
    mismatches: list[Mismatch],
) -> None:
    sender, receiver = pair
    for send, receive in zip(sends, receives, strict=False):
        groups.append(((sender, send), (receiver, receive)))
        sent = plan.programs[sender][send].reads
        received = plan.programs[receiver][receive].writes
        if sent != received:
            message = f"rank {sender} sends {sent[0]} where rank {receiver} expects {received[0]}"
            mismatches.append(Mismatch(rank=receiver, index=receive, message=message))
    paired = min(len(sends), len(receives))
    for index in sends[paired:]:
        message = f"this SEND to rank {receiver} has no RECEIVE there"
        mismatches.append(Mismatch(rank=sender, index=index, message=message))
    for index in receives[paired:]:
        message = f"this RECEIVE waits for a SEND that rank {sender} never makes"
        mismatches.append(Mismatch(rank=receiver, index=index, message=message))


def _match_tied(
    plan: Plan,
    name: str,
    by_rank: dict[int, list[int]],
    groups: list[tuple[tuple[int, int], ...]],
    mismatches: list[Mismatch],
) -> None:
    holders = next(unit.ranks for unit in plan.units if unit.name == name)
    for position in range(max(map(len, by_rank.values()))):
        group = tuple((r, calls[position]) for r, calls in by_rank.items() if position < len(calls))
        groups.append(group)
        entered = sorted(rank for rank, _ in group)
        if entered != sorted(holders):
            message = f"REDUCE_TIED of {name} is entered by pipeline ranks {entered}, but "
            message += f"{list(holders)} hold the unit"
            mismatches.append(Mismatch(rank=group[0][0], index=group[0][1], message=message))
