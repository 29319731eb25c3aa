"""`lga-show PLAN`: what a plan does, as tables and a timeline."""

from pathlib import Path

import click
from rich.text import Text

from planner.console import HELP, command_errors, console
from planner.plan.file import read_plan
from planner.report import (
    memory_table,
    placement_table,
    plan_lines,
    program_counts,
    seconds_text,
    timeline_rows,
)
from planner.simulate import simulate

__all__ = ["main"]


@click.command(context_settings=HELP)
@click.argument("plan", type=click.Path(path_type=Path))
@command_errors()
def main(plan: Path) -> None:
    """Show what the plan file PLAN does.

    Prints the placement of layers, memory per device, instructions per step, and the simulated
    timeline: a row for each pipeline rank, as wide as the terminal (COLUMNS sets another width).
    """
    loaded = read_plan(plan)
    simulation = simulate(loaded)
    for line in plan_lines(loaded):
        console.print(Text(line), soft_wrap=True)
    console.print(placement_table(loaded))
    console.print(memory_table(loaded, simulation))
    console.print(program_counts(loaded))
    console.print(
        Text(f"step      {seconds_text(simulation.step_seconds)}, bubble {simulation.bubble:.1%}"),
        soft_wrap=True,
    )
    for row in timeline_rows(loaded, simulation.timeline, width=console.width):
        console.print(row, no_wrap=True, overflow="crop")
