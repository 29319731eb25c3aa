"""Orders made by list scheduling: whoever is free takes the most urgent thing that may start.

Memory is kept like a banker's money: a forward may start only if all micro-batches under way could
still be finished one after the other, the oldest first. So no list comes to a halt while a rank
waits for memory that nobody can give back. This module knows what may start and a few ideas of
what is urgent. It proves nothing about their quality.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from planner.order.operations import Operations, Sequences
from planner.order.paths import heads_and_tails

__all__ = ["POLICIES", "Priority", "list_order", "policy"]

Priority = Callable[[bool, int, int], tuple[float, ...]]
"""Of (whether it is a backward, stage, micro-batch): the smallest goes first."""

POLICIES = ("backward first", "oldest first", "forward first", "longest tail", "in groups")


def policy(name: str, operations: Operations) -> Priority:
    """One of the ideas of what is urgent, by its name in POLICIES."""
    size = operations.num_ranks
    _, tails = heads_and_tails(operations)

    def tail(is_backward: bool, stage: int, micro_batch: int) -> float:
        of = operations.backward_of if is_backward else operations.forward_of
        operation = of(stage, micro_batch)
        return -(tails[operation] + operations.durations[operation])

    known: Mapping[str, Priority] = {
        # Free memory as soon as possible, and go deep.
        "backward first": lambda back, stage, m: (not back, m if back else -stage, stage, m),
        "oldest first": lambda back, stage, m: (m, not back, -stage),
        # Breadth first.
        "forward first": lambda back, stage, m: (back, -stage if back else stage, m),
        "longest tail": lambda back, stage, m: (tail(back, stage, m), m, stage),
        # As many micro-batches as ranks go through a stage together.
        "in groups": lambda back, stage, m: (not back, m // size, -stage if back else stage, m),
    }
    return known[name]


def list_order(operations: Operations, urgency: Priority) -> Sequences | None:
    """An order that fits in memory; None where not even one micro-batch at a time does."""
    state = _State(operations=operations)
    for rank in range(operations.num_ranks):
        if state.room[rank] < sum(operations.held[s] for s in operations.stages_of(rank)):
            return None
    if operations.layered and not state.reserve():
        return None
    for _ in range(operations.num_operations):
        operation = state.choose(urgency)
        if operation is None:
            return None
        state.start(operation)
    return tuple(map(tuple, state.sequences))


@dataclass(slots=True, kw_only=True)
class _State:
    """A partial order and its clock."""

    operations: Operations
    room: list[int] = field(init=False)
    """Units free by rank, what a running operation takes beyond them left out."""
    sequences: list[list[int]] = field(init=False)
    free_from: list[int] = field(init=False)
    ready_from: dict[int, int] = field(init=False)
    """Operations whose predecessors have started: when they have what they need."""
    missing: list[int] = field(init=False)
    """By operation: predecessors that have not started."""
    followers: list[list[tuple[int, int]]] = field(init=False)
    needed: dict[int, list[int]] = field(default_factory=dict)
    """By micro-batch under way: units by rank that its other forwards will take."""
    taken: dict[int, list[int]] = field(default_factory=dict)
    """By micro-batch under way: units by rank that it holds."""
    backwards_left: list[int] = field(init=False)
    """By stage."""
    most_at_once: dict[int, int] = field(default_factory=dict)
    """By stage, inside the layered rule: micro-batches for which its rank has room."""
    latest: dict[int, int] = field(default_factory=dict)
    """Operations of which some predecessors have started: when those are over."""

    def __post_init__(self) -> None:
        operations = self.operations
        self.room = list(operations.capacity)
        for stage, rank in enumerate(operations.stage_ranks):
            extra = max(operations.forward_extra[stage], operations.backward_extra[stage])
            self.room[rank] = min(self.room[rank], operations.capacity[rank] - extra)
        self.sequences = [[] for _ in self.room]
        self.free_from = [0] * len(self.room)
        self.missing = [len(found) for found in operations.predecessors]
        self.followers = [[] for _ in self.missing]
        for operation, predecessors in enumerate(operations.predecessors):
            for earlier, ticks in predecessors:
                self.followers[earlier].append((operation, ticks))
        self.ready_from = {op: 0 for op, number in enumerate(self.missing) if number == 0}
        self.backwards_left = [operations.num_micro_batches] * operations.num_stages

    def reserve(self) -> bool:
        """Inside the layered rule a rank holds every micro-batch of all its stages but the last."""
        operations = self.operations
        for rank, room in enumerate(self.room):
            *others, last = operations.stages_of(rank)
            held = operations.num_micro_batches * sum(operations.held[s] for s in others)
            left, each = room - held, operations.held[last]
            if left < each:
                return False
            self.most_at_once[last] = left // each if each else operations.num_micro_batches
        return True

    def choose(self, urgency: Priority) -> int | None:
        """What starts next: the most urgent of the rank that can start something first."""
        operations, free_from = self.operations, self.free_from

        def place(operation: int) -> tuple[object, ...]:
            rank = operations.ranks[operation]
            now = max(self.ready_from[operation], free_from[rank])
            return now, rank, urgency(*operations.place(operation))

        ranked = sorted(self.ready_from, key=place)
        return next(filter(self._may_start, ranked), None)

    def start(self, operation: int) -> None:
        """Let it run as early as it can."""
        operations = self.operations
        rank = operations.ranks[operation]
        now = max(self.ready_from.pop(operation), self.free_from[rank])
        self.free_from[rank] = now + operations.durations[operation]
        self.sequences[rank].append(operation)
        for later, ticks in self.followers[operation]:
            self._arrive(later, now + ticks)
        is_backward, stage, micro_batch = operations.place(operation)
        units = operations.held[stage]
        if is_backward:
            self.backwards_left[stage] -= 1
            self.room[rank] += units
            self.taken[micro_batch][rank] -= units
        else:
            self._open(micro_batch)
            self.room[rank] -= units
            self.taken[micro_batch][rank] += units
            self.needed[micro_batch][rank] -= units

    def _arrive(self, operation: int, moment: int) -> None:
        self.missing[operation] -= 1
        self.latest[operation] = max(self.latest.get(operation, 0), moment)
        if self.missing[operation] == 0:
            self.ready_from[operation] = self.latest.pop(operation)

    def _open(self, micro_batch: int) -> None:
        if micro_batch not in self.taken:
            needed = [0] * len(self.room)
            for stage, rank in enumerate(self.operations.stage_ranks):
                needed[rank] += self.operations.held[stage]
            self.needed[micro_batch], self.taken[micro_batch] = needed, [0] * len(self.room)

    def _may_start(self, operation: int) -> bool:
        """Whether memory allows it."""
        operations = self.operations
        is_backward, stage, micro_batch = operations.place(operation)
        if is_backward:
            return True
        if operations.layered:
            window = self.most_at_once.get(stage, operations.num_micro_batches)
            num_done = operations.num_micro_batches - self.backwards_left[stage]
            return micro_batch - num_done < window
        rank, units = operations.ranks[operation], operations.held[stage]
        if self.room[rank] < units:
            return False
        return self._is_safe(rank, units, micro_batch)

    def _is_safe(self, rank: int, units: int, micro_batch: int) -> bool:
        """Whether all could be finished, the oldest first, if it started now."""
        self._open(micro_batch)
        room: Sequence[int] = self.room
        for number in sorted(self.taken):
            if number == micro_batch:
                # What it takes now it needs no more later: the sum is the same.
                return all(n <= r for n, r in zip(self.needed[number], room, strict=True))
            needed, taken = self.needed[number], self.taken[number]
            free = [r - (units if index == rank else 0) for index, r in enumerate(room)]
            if any(n > r for n, r in zip(needed, free, strict=True)):
                return False
            room = [r + t for r, t in zip(room, taken, strict=True)]
        return True
