"""One step's compute as a scheduling problem in whole numbers.

An operation is the forward of one stage and micro-batch, or its backward with the recompute right
before it. It takes a fixed number of ticks on its rank, waits for others, and what its stage keeps
is held from the start of the forward to the end of the backward. Micro-batches are alike, so they
pass every stage in ascending order without loss, in both directions. This module knows the problem
and its longest paths. It does not know where the figures come from, nor how an order is found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from planner.solve.types import Placement

__all__ = ["Hop", "Operations", "Sequences", "num_operations"]

Sequences = tuple[tuple[int, ...], ...]
"""Operations of each rank in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """What one stage's compute waits for of another's."""

    source: int
    """Stage; for gradients it is the later of the two."""
    target: int
    ticks: int
    """Of the transfer; 0 within a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The problem. Operation s M + m is the forward of stage s and micro-batch m; S M + s M + m is
    its backward (S stages, M micro-batches). All times are ticks, all memory units.
    """

    num_micro_batches: int
    stage_ranks: tuple[int, ...]
    forward: tuple[int, ...]
    """Ticks by stage."""
    rebuild: tuple[int, ...]
    """Ticks of the second forward, which needs no gradient; 0 where nothing is recomputed."""
    backward: tuple[int, ...]
    """Ticks without the second forward."""
    arrivals: tuple[Hop, ...]
    returns: tuple[Hop, ...]
    """Of gradients."""
    update: tuple[int, ...]
    """Ticks of its rank by stage, right behind its last backward; 0 where it comes later."""
    held: tuple[int, ...]
    """Units by stage: of one micro-batch from forward's start to backward's end."""
    forward_extra: tuple[int, ...]
    """Units by stage: while one forward runs, beyond what is held."""
    backward_extra: tuple[int, ...]
    capacity: tuple[int, ...]
    """Units by rank."""
    layered: bool
    """A rank ends the backward of all micro-batches through a stage before it begins that of any
    preceding one."""
    tick_seconds: float
    unit_bytes: int
    durations: tuple[int, ...] = field(init=False)
    """Ticks by operation."""
    ranks: tuple[int, ...] = field(init=False)
    """By operation."""
    predecessors: tuple[tuple[tuple[int, int], ...], ...] = field(init=False)
    """By operation: (earlier operation, ticks from its start to this one's start at least)."""

    def __post_init__(self) -> None:
        count, stages = self.num_micro_batches, range(self.num_stages)
        forward = [self.forward[stage] for stage in stages for _ in range(count)]
        turns = [self.turn(stage) for stage in stages for _ in range(count)]
        for stage in stages:
            turns[(stage + 1) * count - 1] += self.update[stage]
        ranks = [self.stage_ranks[stage] for stage in stages for _ in range(count)]
        object.__setattr__(self, "durations", (*forward, *turns))
        object.__setattr__(self, "ranks", (*ranks, *ranks))
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_operations)]
        for earlier, later, ticks in self._precedences():
            found[later].append((earlier, ticks))
        object.__setattr__(self, "predecessors", tuple(map(tuple, found)))

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def num_ranks(self) -> int:
        return len(self.capacity)

    @property
    def num_operations(self) -> int:
        return 2 * self.num_stages * self.num_micro_batches

    def forward_of(self, stage: int, micro_batch: int) -> int:
        """The operation."""
        return stage * self.num_micro_batches + micro_batch

    def backward_of(self, stage: int, micro_batch: int) -> int:
        """The operation."""
        return (self.num_stages + stage) * self.num_micro_batches + micro_batch

    def turn(self, stage: int) -> int:
        """Ticks of one backward with its second forward."""
        return self.rebuild[stage] + self.backward[stage]

    def place(self, operation: int) -> tuple[bool, int, int]:
        """(whether it is a backward, stage, micro-batch)."""
        row, micro_batch = divmod(operation, self.num_micro_batches)
        is_backward, stage = divmod(row, self.num_stages)
        return bool(is_backward), stage, micro_batch

    def stages_of(self, rank: int) -> list[int]:
        """Stages of a rank, ascending."""
        return [stage for stage, own in enumerate(self.stage_ranks) if own == rank]

    def window(self, stage: int) -> int:
        """Micro-batches of a stage that its rank can hold at once."""
        held, rank = self.held[stage], self.stage_ranks[stage]
        extra = min(self.forward_extra[stage], self.backward_extra[stage])
        room = self.capacity[rank] - extra
        if held == 0:
            return self.num_micro_batches
        return max(0, min(self.num_micro_batches, room // held))

    def _precedences(self) -> Iterator[tuple[int, int, int]]:
        """(earlier, later, ticks from start to start)."""
        count = self.num_micro_batches
        for micro_batch in range(count):
            yield from self._of_micro_batch(micro_batch)
        for stage in range(self.num_stages):
            first, back = self.forward_of(stage, 0), self.backward_of(stage, 0)
            turn = self.turn(stage)
            for micro_batch in range(1, count):
                # Micro-batches pass a stage in ascending order.
                yield first + micro_batch - 1, first + micro_batch, self.forward[stage]
                yield back + micro_batch - 1, back + micro_batch, turn
            window = self.window(stage)
            for micro_batch in range(max(1, window), count):
                # As many of this stage alone as its rank can hold.
                yield back + micro_batch - window, first + micro_batch, turn
        if self.layered:
            for rank in range(self.num_ranks):
                stages = self.stages_of(rank)
                for earlier, later in zip(stages[1:], stages[:-1], strict=True):
                    turn = self.turn(earlier) + self.update[earlier]
                    last = self.backward_of(earlier, count - 1)
                    yield last, self.backward_of(later, 0), turn

    def _of_micro_batch(self, micro_batch: int) -> Iterator[tuple[int, int, int]]:
        for stage in range(self.num_stages):
            forward, backward = (
                self.forward_of(stage, micro_batch),
                self.backward_of(stage, micro_batch),
            )
            yield forward, backward, self.forward[stage]
        for hop in self.arrivals:
            source = self.forward_of(hop.source, micro_batch)
            target = self.forward_of(hop.target, micro_batch)
            yield source, target, self.forward[hop.source] + hop.ticks
        for hop in self.returns:
            source = self.backward_of(hop.source, micro_batch)
            target = self.backward_of(hop.target, micro_batch)
            # The second forward does not wait for the gradient.
            ticks = self.turn(hop.source) + hop.ticks - self.rebuild[hop.target]
            yield source, target, ticks


def num_operations(placement: Placement) -> int:
    """Forwards and backwards of one step."""
    return 2 * placement.num_stages * placement.num_micro_batches
