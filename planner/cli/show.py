"""`lga-show PLAN`: what a plan does, as tables and a timeline."""

from pathlib import Path

import click
from rich.text import Text

from planner.console import command_errors, console
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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("plan", type=click.Path(path_type=Path))
@command_errors()
def main(plan: Path) -> None:
    """Show the plan file PLAN: placement, memory, instruction counts, simulated timeline."""
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
