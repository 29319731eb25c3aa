"""The machine: what can happen next on the ranks of a plan, and what it does to their buffers.

A rank issues its instructions in order; an issued one is in flight until it finishes. What an
instruction reads is bound when it is issued, because conflicting uses are over then; it empties
what it spends, evicts or releases at the same moment; what it writes is there when it finishes.
SEND and RECEIVE, and the calls of one collective on several ranks, finish together. An instruction
starts when it heads its stream; nothing depends on when, so starts are no transitions of their own.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from oracle.facts import Facts
from oracle.operations import Content, collect, operate
from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["Cell", "Machine", "State"]

Cell = tuple[int, int]
"""(rank, index in its program)."""
_EVERYWHERE = (Opcode.CHECK_FINITE, Opcode.CLIP)


@dataclass(slots=True)
class State:
    """Everything that can differ between two moments of a step."""

    issued: list[int]
    """Per rank: how many instructions have been issued."""
    flying: list[dict[int, dict[str, Content]]]
    """Per rank: those in flight, with what each will have written when it finishes."""
    held: list[dict[str, Content]]
    """Per rank: buffer -> content."""

    def copy(self) -> "State":
        return State(self.issued.copy(), [f.copy() for f in self.flying], [*map(dict, self.held)])

    def key(self) -> tuple[object, ...]:
        """Equal for equal states."""
        flying = tuple(
            tuple((index, frozenset(made.items())) for index, made in sorted(flights.items()))
            for flights in self.flying
        )
        return tuple(self.issued), flying, tuple(frozenset(h.items()) for h in self.held)


class Machine:
    """The transitions of one plan."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.programs = facts, facts.plan.programs
        self.group_of: dict[Cell, tuple[Cell, ...]] = {}
        """Cells that finish together; empty where one is missing, so that none ever does."""
        calls: dict[tuple[int, Opcode, int | None, str | None], list[int]] = defaultdict(list)
        for rank, program in enumerate(self.programs):
            for index, line in enumerate(program):
                calls[rank, line.opcode, line.peer, line.unit].append(index)
        for (rank, opcode, peer, unit), indices in calls.items():
            partners = _partners(facts.plan, rank, opcode, peer, unit)
            places = [(r, calls.get((r, op, p, unit), [])) for r, op, p in partners]
            for number, index in enumerate(indices):
                found = tuple((r, where[number]) for r, where in places if number < len(where))
                self.group_of[rank, index] = found if len(found) == len(places) else ()

    def start(self) -> State:
        """Every rank holds the state of its units, on the device or on the host."""
        plan = self.facts.plan
        held: list[dict[str, Content]] = [{} for _ in self.programs]
        if plan.options.clip_delayed:
            held = [{"clip:scale": ("value", "clip:scale")} for _ in self.programs]
        for unit in plan.units:
            for rank in unit.ranks:
                for kind in ("shard", "moments"):
                    place = "host:" if kind in self.facts.away else ""
                    held[rank][f"{place}{kind}:{unit.name}"] = ("state", unit.name)
                if not plan.gathers:
                    held[rank][f"weights:{unit.name}"] = ("weights", unit.name)
        return State([0] * len(self.programs), [{} for _ in self.programs], held)

    def next_instruction(self, state: State, rank: int) -> Instruction | None:
        position = state.issued[rank]
        return self.programs[rank][position] if position < len(self.programs[rank]) else None

    def can_issue(self, state: State, rank: int) -> bool:
        """Every compute instruction before the next one is over, and so are conflicting uses."""
        new = self.next_instruction(state, rank)
        if new is None:
            return False
        for index in state.flying[rank]:
            old = self.programs[rank][index]
            if old.stream == "compute" or _conflict(old, new) or _conflict(new, old):
                return False
        return True

    def issue(self, state: State, rank: int) -> None:
        """Bind what the rank's next instruction reads.

        Raises:
            Wrong: it finds something else than it needs.
        """
        index = state.issued[rank]
        made = operate(self.facts, rank, self.programs[rank][index], state.held[rank])
        state.flying[rank][index] = made
        state.issued[rank] += 1

    def finishable(self, state: State) -> Iterator[tuple[Cell, ...]]:
        """Groups whose every member is in flight and at the head of its stream."""
        for rank, flights in enumerate(state.flying):
            for index in flights:
                group = self.group_of[rank, index]
                if (
                    group
                    and group[0] == (rank, index)
                    and all(self._heads(state, c) for c in group)
                ):
                    yield group

    def finish(self, state: State, group: tuple[Cell, ...]) -> None:
        """Let a group's writes be there.

        Raises:
            Wrong: its members do not agree.
        """
        made = [state.flying[rank].pop(index) for rank, index in group]
        if len(group) > 1:
            made = collect([self.programs[rank][index] for rank, index in group], made)
        for (rank, _), contents in zip(group, made, strict=True):
            state.held[rank].update(contents)

    def _heads(self, state: State, cell: Cell) -> bool:
        rank, index = cell
        stream = self.programs[rank][index].stream
        earlier = (i for i in state.flying[rank] if i < index)
        return index in state.flying[rank] and all(
            self.programs[rank][i].stream != stream for i in earlier
        )


def _conflict(one: Instruction, other: Instruction) -> bool:
    """Whether the first writes what the second uses."""
    return any(buffer in other.reads or buffer in other.writes for buffer in one.writes)


def _partners(
    plan: Plan, rank: int, opcode: Opcode, peer: int | None, unit: str | None
) -> list[tuple[int, Opcode, int | None]]:
    """(rank, opcode, peer) of all that finish together, sender first."""
    if opcode is Opcode.SEND:
        return [(rank, opcode, peer), (peer or 0, Opcode.RECEIVE, rank)]
    if opcode is Opcode.RECEIVE:
        return [(peer or 0, Opcode.SEND, rank), (rank, opcode, peer)]
    if opcode in _EVERYWHERE:
        return [(r, opcode, None) for r in range(plan.num_pipeline_ranks)]
    if opcode is Opcode.REDUCE_TIED:
        return [(r, opcode, None) for u in plan.units if u.name == unit for r in u.ranks]
    return [(rank, opcode, peer)]
