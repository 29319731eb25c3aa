"""What is known of one rank's program before it runs.

This module knows instructions and names of buffers. It does not know tensors.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from planner.errors import PlanFileError
from planner.plan.names import buffer_key, kind_of
from planner.plan.types import Instruction, Opcode

__all__ = ["Conflicts", "Program"]

_SPENDS = (Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.UPDATE, Opcode.EVICT)
_GOES_ON = (
    Opcode.RECEIVE, Opcode.GATHER, Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.CHECK_FINITE,
    Opcode.CLIP, Opcode.FETCH, Opcode.EVICT, Opcode.SAVE,
)  # fmt: skip
"""What may still be under way when the next instruction starts. A SEND keeps its own tensor."""


class Conflicts(NamedTuple):
    """Buffers of one instruction that something started before it may still be using."""

    written: tuple[str, ...]
    """Something may still arrive in them."""
    read: tuple[str, ...]
    """The instruction writes them, and their last content may still be leaving."""


class Program:
    """One rank's instructions, of a step or of an evaluation."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        *,
        is_evaluation: bool,
        offloaded: Collection[str],
        loads_beside: bool = False,
    ) -> None:
        """
        Args:
            instructions: in issue order.
            is_evaluation: it runs forward only.
            offloaded: kinds of state buffers that come and go.
            loads_beside: a LOAD, too, may still be under way when the next instruction starts.

        Raises:
            PlanFileError: a gradient is accumulated that nothing uses.
        """
        self.instructions = tuple(instructions)
        self.is_evaluation = is_evaluation
        self.dying = _last_uses(self.instructions, offloaded)
        """Index -> buffers that hold nothing any more when the instruction there is over."""
        goes_on = (*_GOES_ON, Opcode.LOAD) if loads_beside else _GOES_ON
        self.conflicts = _conflicts(self.instructions, goes_on)
        """By index."""
        self.sums = _units_of_sums(self.instructions)
        """Index -> accumulation buffers of the instruction there, and whose gradient each holds."""
        self.evicted = frozenset(
            buffer_key(name) for i in instructions if i.opcode is Opcode.EVICT for name in i.reads
        )
        """Buffers that go to host memory, without `.<m>`."""

    def units_of_pools(self) -> Iterator[tuple[str, str]]:
        """(pool buffer, unit) for every unit that a gather or accumulation buffer takes."""
        for sums in self.sums.values():
            yield from sums.items()
        for instruction in self.instructions:
            if instruction.opcode is Opcode.GATHER and instruction.unit is not None:
                yield instruction.writes[0], instruction.unit


def _conflicts(
    instructions: Sequence[Instruction], goes_on: Collection[Opcode]
) -> tuple[Conflicts, ...]:
    found = []
    arriving: set[str] = set()
    leaving: set[str] = set()
    for instruction in instructions:
        used = dict.fromkeys((*instruction.reads, *instruction.writes))
        if instruction.stream == "host":  # which itself waits for what is copied to it
            used = dict.fromkeys(name for name in used if kind_of(name) != "host")
        written = tuple(name for name in used if name in arriving)
        read = tuple(name for name in instruction.writes if name in leaving)
        arriving.difference_update(written)
        leaving.difference_update(read)
        found.append(Conflicts(written, read))
        if instruction.opcode in goes_on or instruction.stream == "host":
            arriving.update(instruction.writes)
            leaving.update(instruction.reads)
    return tuple(found)


def _last_uses(
    instructions: Sequence[Instruction], offloaded: Collection[str]
) -> dict[int, tuple[str, ...]]:
    """What is fetched from host memory is not needed from its last use before the FETCH on."""
    found: dict[int, list[str]] = {}
    last_use: dict[str, int] = {}
    for index, instruction in enumerate(instructions):
        if instruction.opcode is Opcode.FETCH:
            for name in instruction.writes:
                if name in last_use:
                    found.setdefault(last_use[name], []).append(name)
        for name in (*instruction.reads, *instruction.writes):
            if _comes_and_goes(name, offloaded):
                last_use[name] = index
    for name, index in last_use.items():
        found.setdefault(index, []).append(name)
    return {index: tuple(names) for index, names in found.items()}


def _comes_and_goes(name: str, offloaded: Collection[str]) -> bool:
    kind = kind_of(name)
    if kind == "host":
        return kind_of(name.removeprefix("host:")) not in ("shard", "moments")
    return kind in offloaded or kind not in ("weights", "sum", "shard", "moments", "clip")


def _units_of_sums(instructions: Sequence[Instruction]) -> dict[int, Mapping[str, str]]:
    """A sum is of the unit of the instruction that spends it next, or that it went to the host for:
    then verdicts may look at it yet."""
    found: dict[int, Mapping[str, str]] = {}
    units: dict[str, str] = {}
    for instruction in instructions:
        if instruction.opcode is Opcode.EVICT and instruction.unit is not None:
            sums = {name for name in instruction.reads if kind_of(name) == "sum"}
            units.update(dict.fromkeys(sums, instruction.unit))
    for index, instruction in reversed(list(enumerate(instructions))):
        sums = {name for name in (*instruction.reads, *instruction.writes)
                if kind_of(name) == "sum"}  # fmt: skip
        if not sums:
            continue
        if instruction.opcode in _SPENDS and instruction.unit is not None:
            units.update(dict.fromkeys(sums, instruction.unit))
        unused = sorted(sums - units.keys())
        if unused:
            raise PlanFileError(
                f"instruction {index} ({instruction.opcode.value} of stage {instruction.stage}) "
                f"uses {unused[0]}, but no later instruction reduces it or updates with it",
                hint="see what lga-check says of the plan",
            )
        found[index] = {name: units[name] for name in sums}
    return found
