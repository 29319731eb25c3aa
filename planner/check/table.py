"""Programs around failing instructions: the ranks side by side, those instructions marked.

Each rank concerned is a column, with some lines around each of its marked instructions and "..."
where lines are left out. The first marked one of each rank stands in one row.
"""

from collections.abc import Sequence

from planner.check.types import Cell
from planner.plan.names import kind_of
from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["instruction_label", "program_table"]

_CONTEXT = 3
_MAX_COLUMNS = 4
"""Side by side; more ranks follow below."""
_MAX_RANKS = 16
_MAX_MARKED = 12
"""Of one rank."""
_LETTERS = {
    Opcode.FORWARD: "F",
    Opcode.RECOMPUTE: "R",
    Opcode.BACKWARD: "B",
    Opcode.BACKWARD_INPUT: "B-INPUT",
    Opcode.BACKWARD_WEIGHT: "B-WEIGHT",
}


def instruction_label(instruction: Instruction) -> str:
    """A few words: `F 3.1` is FORWARD of stage 3, micro-batch 1."""
    opcode = instruction.opcode
    if opcode in _LETTERS:
        return f"{_LETTERS[opcode]} {instruction.stage}.{instruction.micro_batch}"
    match opcode:
        case Opcode.SEND:
            return f"SEND {' '.join(instruction.reads)} to {instruction.peer}"
        case Opcode.RECEIVE:
            return f"RECEIVE {' '.join(instruction.writes)} from {instruction.peer}"
        case Opcode.LOAD | Opcode.FETCH:
            return f"{opcode.value} {' '.join(instruction.writes)}"
        case Opcode.GATHER:
            return f"GATHER {instruction.unit} into {' '.join(instruction.writes)}"
        case Opcode.RELEASE if any(kind_of(name) == "weights" for name in instruction.reads):
            return f"RELEASE {instruction.unit} from {' '.join(instruction.reads)}"
        case Opcode.EVICT | Opcode.RELEASE:
            return f"{opcode.value} {' '.join(instruction.reads)}"
    return f"{opcode.value} {instruction.unit}" if instruction.unit is not None else opcode.value


def program_table(plan: Plan, cells: Sequence[Cell]) -> str:
    """A column per rank concerned; the instructions at `cells` stand in >>> <<<."""
    marked: dict[int, list[int]] = {}
    for rank, index in cells:
        marked.setdefault(rank, []).append(index)
    ranks = list(marked)[:_MAX_RANKS]
    blocks = []
    for first in range(0, len(ranks), _MAX_COLUMNS):
        columns = [
            _column(plan, rank, marked[rank]) for rank in ranks[first : first + _MAX_COLUMNS]
        ]
        blocks.append(_side_by_side(columns))
    if len(marked) > len(ranks):
        blocks.append(f"... and {len(marked) - len(ranks)} more ranks")
    return "\n\n".join(blocks)


def _column(plan: Plan, rank: int, marked: list[int]) -> tuple[list[str], int]:
    """The lines of one rank, and which of them holds its first marked instruction."""
    program, chosen = plan.programs[rank], sorted(set(marked[:_MAX_MARKED]))
    shown = sorted(
        {
            i
            for at in chosen
            for i in range(at - _CONTEXT, at + _CONTEXT + 1)
            if 0 <= i < len(program)
        }
    )
    lines, anchor, before = [], 0, -1
    for index in shown:
        if index > before + 1:
            lines.append("  ...")
        label = instruction_label(program[index])
        if index == chosen[0]:
            anchor = len(lines)
        lines.append(f"{index:>5} " + (f">>> {label} <<<" if index in marked else label))
        before = index
    if before + 1 < len(program):
        lines.append("  ...")
    left = len(set(marked)) - len(chosen)
    return [
        f"rank {rank}" + (f", {left} marked ones not shown" if left else ""),
        *lines,
    ], anchor + 1


def _side_by_side(columns: list[tuple[list[str], int]]) -> str:
    """Columns with their anchors in one row, heads in the first."""
    below = max(anchor for _, anchor in columns)
    padded = []
    for (head, *lines), anchor in columns:
        width = max(map(len, (head, *lines)))
        padded.append([line.ljust(width) for line in (head, *[""] * (below - anchor), *lines)])
    height = max(map(len, padded))
    rows = [
        " | ".join(column[row] if row < len(column) else " " * len(column[0]) for column in padded)
        for row in range(height)
    ]
    return "\n".join(row.rstrip() for row in rows)
