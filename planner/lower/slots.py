"""Where instructions stand among a rank's compute steps: before one, or behind it.

The passes put their instructions here, each pass once; at one place, what was put first comes
first. This module does not know what the instructions mean.
"""

from collections.abc import Sequence

from planner.plan.names import stream_of
from planner.plan.types import Instruction, Opcode

__all__ = ["LOOKAHEAD", "BufferNames", "Slots", "unit_instruction"]

LOOKAHEAD = 2
"""Compute steps between the issue of a RECEIVE or a FETCH and the step that reads it."""


class Slots:
    """The places of one rank's program."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._before: list[list[Instruction]] = [[] for _ in range(num_steps)]
        self._behind: list[list[Instruction]] = [[] for _ in range(num_steps + 2)]

    def before(self, step: int, instruction: Instruction) -> None:
        """Issue it when the step before `step` is over."""
        self._before[step].append(instruction)

    def behind(self, step: int, instruction: Instruction) -> None:
        """Issue it when `step` is over; -1 is the start of the program, `num_steps` its end."""
        self._behind[step + 1].append(instruction)

    def program(self, compute: Sequence[Instruction]) -> tuple[Instruction, ...]:
        """All instructions in issue order, `compute` being those of the steps themselves."""
        found = [*self._behind[0]]
        for before, instruction, behind in zip(
            self._before, compute, self._behind[1:-1], strict=True
        ):
            found += before
            found.append(instruction)
            found += behind
        return (*found, *self._behind[-1])


class BufferNames(dict[str, list[str]]):
    """`<name>.<m>` of every micro-batch by `<name>`, each string made once for all programs."""

    def __init__(self, num_micro_batches: int) -> None:
        super().__init__()
        self._num_micro_batches = num_micro_batches

    def __missing__(self, name: str) -> list[str]:
        self[name] = [f"{name}.{m}" for m in range(self._num_micro_batches)]
        return self[name]


def unit_instruction(
    opcode: Opcode,
    unit: str | None,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
) -> Instruction:
    """An instruction that concerns a unit, or the whole model."""
    return Instruction(
        opcode=opcode, stream=stream_of(opcode), unit=unit, reads=reads, writes=writes
    )
