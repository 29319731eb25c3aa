"""A Timeline as rows of letters: what each rank computes, over time.

A stage is a letter, small while it runs forward, capital while it runs backward. This module knows
letters and colours; it does not print.
"""

from rich.text import Text

from planner.plan.types import Opcode, Plan
from planner.report.quantities import seconds_text
from planner.timeline import Timeline

__all__ = ["timeline_rows"]

_STYLES = {Opcode.FORWARD: "green", Opcode.RECOMPUTE: "yellow", Opcode.BACKWARD: "blue"}
_IDLE = "."


def timeline_rows(plan: Plan, timeline: Timeline, *, width: int) -> list[Text]:
    """One row per pipeline rank, `width` columns of time, and a legend."""
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
    legend = Text(" " * head, style="dim")
    legend.append(f"0 to {seconds_text(step)}; stage 0 is a (forward) and A (backward), stage 1 b")
    legend.append(" and B, and so on; + recomputes; . waits")
    return [*rows, legend]


def _letter(opcode: Opcode, stage: int) -> str:
    if opcode is Opcode.RECOMPUTE:
        return "+"
    letter = chr(ord("a") + stage % 26)
    return letter.upper() if opcode is Opcode.BACKWARD else letter
