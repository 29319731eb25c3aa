"""`lga-show PLAN`: what a plan does, as tables and a timeline, and as files for other viewers."""

from pathlib import Path

import click
from rich.text import Text

from planner.console import HELP, check_can_write, command_errors, console
from planner.export.chrome import chrome_trace
from planner.export.timeline_file import read_timeline
from planner.export.torch_csv import CsvFormat, csv_notes, print_csv
from planner.files import write_text
from planner.plan.file import read_plan
from planner.plan.types import Plan
from planner.report import (
    measured_table,
    memory_table,
    placement_table,
    plan_lines,
    program_counts,
    seconds_text,
    timeline_rows,
)
from planner.simulate import Simulation, memory_over_time, simulate

__all__ = ["main"]

_FILE = click.Path(path_type=Path)


@click.command(context_settings=HELP)
@click.argument("plan", type=_FILE)
@click.option(
    "--trace",
    type=_FILE,
    help="Write the timeline to this file as a trace that ui.perfetto.dev opens; with --measured, "
    "both timelines.",
)
@click.option(
    "--measured",
    type=_FILE,
    help="A file that lga-run --timeline wrote for this plan: compare it with the prediction.",
)
@click.option(
    "--csv",
    type=_FILE,
    help="Write the schedule to this file as torch.distributed.pipelining loads it.",
)
@click.option(
    "--csv-format",
    type=click.Choice([csv_format.value for csv_format in CsvFormat]),
    default=CsvFormat.COMPUTE_ONLY.value,
    show_default=True,
    help="compute_only: torch adds its own transfers. compute_comms: with those of the plan.",
)
@command_errors()
def main(
    plan: Path, trace: Path | None, measured: Path | None, csv: Path | None, csv_format: str
) -> None:
    """Show what the plan file PLAN does.

    Prints the placement of layers, memory per device, instructions per step, and the simulated
    timeline: a row for each pipeline rank, as wide as the terminal (COLUMNS sets another width).
    """
    inputs = [path for path in (plan, measured) if path is not None]
    for path, option in ((trace, "--trace"), (csv, "--csv")):
        if path is not None:
            check_can_write(path, option, inputs)
    loaded = read_plan(plan)
    simulation = simulate(loaded)
    timelines = [simulation.timeline]
    if measured is not None:
        timelines.append(read_timeline(measured, loaded))
    _print_plan(loaded, simulation)
    if measured is not None:
        console.print(measured_table(loaded, *timelines))
    if trace is not None:
        memory = memory_over_time(loaded, simulation.timeline)
        write_text(trace, chrome_trace(loaded, timelines, memory))
        console.print(f"trace written to {trace}: open it in ui.perfetto.dev", soft_wrap=True)
    if csv is not None:
        _write_csv(loaded, csv, CsvFormat(csv_format))


def _print_plan(plan: Plan, simulation: Simulation) -> None:
    for line in plan_lines(plan):
        console.print(Text(line), soft_wrap=True)
    console.print(placement_table(plan))
    console.print(memory_table(plan, simulation))
    console.print(program_counts(plan))
    console.print(
        Text(f"step      {seconds_text(simulation.step_seconds)}, bubble {simulation.bubble:.1%}"),
        soft_wrap=True,
    )
    for row in timeline_rows(plan, simulation.timeline, width=console.width):
        console.print(row, no_wrap=True, overflow="crop")


def _write_csv(plan: Plan, path: Path, csv_format: CsvFormat) -> None:
    write_text(path, print_csv(plan, csv_format))
    console.print(f"schedule written to {path} ({csv_format.value})", soft_wrap=True)
    for note in csv_notes(plan, csv_format):
        console.print(Text(f"  note: {note}"), soft_wrap=True)
