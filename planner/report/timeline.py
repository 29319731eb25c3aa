"""A Timeline as rows of letters: what each rank computes, over time.

A stage is a letter, small while it runs forward, capital while it runs backward. This module knows
letters and colours; it does not print.
"""

from rich.text import Text

from planner.plan.types import Opcode, Plan
from planner.report.quantities import seconds_text
from planner.timeline import Timeline

__all__ = ["timeline_rows"]

_STYLES = {
    Opcode.FORWARD: "green",
    Opcode.RECOMPUTE: "yellow",
    Opcode.BACKWARD: "blue",
    Opcode.BACKWARD_INPUT: "blue",
    Opcode.BACKWARD_WEIGHT: "magenta",
}
_SIGNS = {Opcode.RECOMPUTE: "+", Opcode.BACKWARD_WEIGHT: "="}
_IDLE = "."


def timeline_rows(plan: Plan, timeline: Timeline, *, width: int) -> list[Text]:
    """One row per pipeline rank, `width` columns of time, then the axis and a legend."""
    step = timeline.step_seconds
    head = max(len(f"rank {plan.num_pipeline_ranks - 1} "), 8)
    columns = max(10, width - head)
    cells = [[(_IDLE, "dim")] * columns for _ in plan.programs]
    covered = [[0.0] * columns for _ in plan.programs]
    for event in timeline.events:
        instruction = plan.programs[event.rank][event.index]
        if instruction.opcode not in _STYLES or instruction.stage is None or step <= 0:
            continue
        cell = (_letter(instruction.opcode, instruction.stage), _STYLES[instruction.opcode])
        first = event.start_seconds / step * columns
        last = event.end_seconds / step * columns
        for column in range(int(first), min(columns, int(last) + 1)):
            share = min(last, column + 1) - max(first, column)
            if share > covered[event.rank][column]:
                covered[event.rank][column] = share
                cells[event.rank][column] = cell
    rows = []
    for rank, row in enumerate(cells):
        text = Text(f"rank {rank} ".ljust(head))
        for letter, style in row:
            text.append(letter, style=style)
        rows.append(text)
    return [*rows, *_legend(plan, head, columns, seconds_text(step))]


def _legend(plan: Plan, head: int, columns: int, end: str) -> list[Text]:
    """The axis of time, and what the letters mean, in lines that fit 80 columns."""
    last = chr(ord("a") + min(plan.num_stages, 26) - 1)
    words = f"a to {last}: stages 0 to {plan.num_stages - 1} forward, A to {last.upper()}: backward"
    if plan.num_stages > 26:
        words += ", again from a after z"
    more = ["+: recomputation"] if any(stage.recompute for stage in plan.stages) else []
    opcodes = {instruction.opcode for program in plan.programs for instruction in program}
    more += ["=: weight gradients"] if Opcode.BACKWARD_WEIGHT in opcodes else []
    lines = ["0".ljust(columns - len(end)) + end, words, "; ".join([*more, ".: waiting"])]
    return [Text(" " * head + line, style="dim") for line in lines]


def _letter(opcode: Opcode, stage: int) -> str:
    if opcode in _SIGNS:
        return _SIGNS[opcode]
    letter = chr(ord("a") + stage % 26)
    return letter if opcode is Opcode.FORWARD else letter.upper()
