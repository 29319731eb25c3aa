"""What a step was predicted to take, against what it took, instruction by instruction.

This module does not know where either timeline comes from.
"""

import math
from collections import Counter, defaultdict

from rich.table import Table

from planner.plan.types import Opcode, Plan
from planner.report.plain import plain_table
from planner.report.quantities import seconds_text
from planner.timeline import Timeline

__all__ = ["measured_table"]


def measured_table(plan: Plan, planned: Timeline, measured: Timeline) -> Table:
    """A row per opcode, its seconds added up over all pipeline ranks; the step as a whole last.

    A measured transfer or collective counts from its start to its end in the rank's own program,
    which may hold no more than the call that starts it.
    """
    title = "predicted and measured, all pipeline ranks together"
    numbers = ["count", "predicted", "measured", "ratio"]
    table = plain_table(title, ["instruction"], numbers)
    counts = Counter(i.opcode for program in plan.programs for i in program)
    predicted_seconds, measured_seconds = _sums(plan, planned), _sums(plan, measured)
    for opcode in Opcode:
        if counts[opcode]:
            row = (predicted_seconds[opcode], measured_seconds[opcode])
            table.add_row(opcode.value, str(counts[opcode]), *_figures(*row))
    table.add_row("step", "", *_figures(planned.step_seconds, measured.step_seconds))
    return table


def _sums(plan: Plan, timeline: Timeline) -> dict[Opcode, float]:
    seconds: dict[Opcode, list[float]] = defaultdict(list)
    for event in timeline.events:
        opcode = plan.programs[event.rank][event.index].opcode
        seconds[opcode].append(event.end_seconds - event.start_seconds)
    return {opcode: math.fsum(seconds[opcode]) for opcode in Opcode}


def _figures(predicted: float, measured: float) -> tuple[str, str, str]:
    ratio = f"{measured / predicted:.2f}" if predicted else "-"
    return seconds_text(predicted), seconds_text(measured), ratio
