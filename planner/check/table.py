"""Programs around a failing instruction, as a plain-text table with that instruction marked."""

from collections.abc import Sequence

from planner.check.types import Cell
from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["instruction_label", "program_table"]

_CONTEXT = 3
_MAX_COLUMNS = 4


def instruction_label(instruction: Instruction) -> str:
    """A few words: `F 3.1` is FORWARD of stage 3, micro-batch 1."""
    match instruction.opcode:
        case Opcode.FORWARD | Opcode.RECOMPUTE | Opcode.BACKWARD:
            return f"{instruction.opcode.value[0]} {instruction.stage}.{instruction.micro_batch}"
        case Opcode.SEND:
            return f"SEND {' '.join(instruction.reads)} to {instruction.peer}"
        case Opcode.RECEIVE:
            return f"RECEIVE {' '.join(instruction.writes)} from {instruction.peer}"
        case Opcode.LOAD:
            return f"LOAD {' '.join(instruction.writes)}"
    return f"{instruction.opcode.value} {instruction.unit}"


def program_table(plan: Plan, cells: Sequence[Cell]) -> str:
    """A column per rank concerned, some lines around its first cell; cells stand in >>> <<<."""
    anchors: dict[int, int] = {}
    for rank, index in cells:
        anchors.setdefault(rank, index)
    columns = []
    for rank, anchor in list(anchors.items())[:_MAX_COLUMNS]:
        first = max(0, anchor - _CONTEXT)
        lines = [f"rank {rank}"]
        for index in range(first, min(len(plan.programs[rank]), anchor + _CONTEXT + 1)):
            label = instruction_label(plan.programs[rank][index])
            marked = f">>> {label} <<<" if (rank, index) in cells else label
            lines.append(f"{index:>5} {marked}")
        width = max(map(len, lines))
        columns.append([line.ljust(width) for line in lines])
    height = max((len(column) for column in columns), default=0)
    rows = [
        " | ".join(column[row] if row < len(column) else " " * len(column[0]) for column in columns)
        for row in range(height)
    ]
    return "\n".join(row.rstrip() for row in rows)
