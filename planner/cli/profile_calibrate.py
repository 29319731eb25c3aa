"""`lga-profile --calibrate`: fit a packaged device to measured step times of GPT models.

Knows the command line and what it prints. The fit is `planner.calibrate`'s.
"""

import math
import sys
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from planner.calibrate import (
    COLUMNS,
    MOST_ROWS,
    PARAMETERS,
    Fit,
    MeasuredStep,
    calibrate,
    choose_rows,
    read_steps,
    step_seconds,
)
from planner.calibrate.known import calibrated_cluster, calibrated_text, start
from planner.cluster.library import device_names
from planner.console import DEVICES, HELP, SEED, check_can_write, command_errors, console
from planner.files import write_text

__all__ = ["main"]

_COLUMN_HELP = "\n".join(f"{name:18}{meaning}" for name, meaning in COLUMNS.items())


@click.command(
    context_settings=HELP,
    help=f"""Fit a device's few parameters to at most {MOST_ROWS} measured step times.

The steps are of GPT models trained by Megatron in half precision, with full recompute, 1F1B and
gradients all-reduced after the last micro-batch. CSV names these columns in its first line, and
may have others:

\b
{_COLUMN_HELP}

Of more than {MOST_ROWS} rows, {MOST_ROWS} are chosen that stand for all; the others show how far
off the fitted device is. The cluster file that is written goes to `lga-plan MODEL --cluster FILE`.
""",
)
@click.option(
    "--calibrate",
    "measured",
    metavar="CSV",
    type=click.Path(path_type=Path),
    required=True,
    help="Measured steps.",
)
@click.option(
    "--device",
    default="a100-80",
    show_default=True,
    help=f"Packaged device to begin with: {', '.join(device_names())}.",
)
@click.option("--network", help="Packaged link between hosts, one adapter for each device.")
@click.option(
    "--gpus", type=DEVICES, help="Devices of the cluster  [default: the most that a row has]"
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the choice of rows.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write  [default: the device's name with .calibrated.yaml, in this folder]",
)
@command_errors()
def main(
    measured: Path,
    device: str,
    network: str | None,
    gpus: int | None,
    seed: int,
    output: Path | None,
) -> None:
    """See the help text above, which lists the columns."""
    path = output if output is not None else Path(f"{device}.calibrated.yaml")
    begun = start(device, network)
    check_can_write(path, "--output", [measured])
    steps = read_steps(measured)
    chosen = choose_rows(steps, MOST_ROWS, seed)
    if len(steps) > MOST_ROWS:
        lines = ", ".join(str(index + 2) for index in chosen)
        words = f"rows      {MOST_ROWS} of {len(steps)} chosen to stand for all: lines {lines}"
        console.print(Text(words), soft_wrap=True)
    fit = calibrate([steps[index] for index in chosen], begun.known)
    source = f"fitted by lga-profile --calibrate to {len(chosen)} measured steps of {measured.name}"
    most = max(step.gpus for step in steps)
    cluster = calibrated_cluster(fit, begun, gpus or most, source)
    text = calibrated_text(fit, cluster, " ".join(["lga-profile", *sys.argv[1:]]))
    write_text(path, text, hint="give another path with --output")
    _print(fit, [step for index, step in enumerate(steps) if index not in set(chosen)])
    console.print(Text(f"cluster   written to {path}"), soft_wrap=True)


def _print(fit: Fit, others: list[MeasuredStep]) -> None:
    table = Table("parameter", "value", "meaning")
    for name, meaning in PARAMETERS.items():
        table.add_row(name, f"{fit.values[name]:.4g}", meaning)
    console.print(table)
    words = (
        f"error     {fit.mean_error:.1%} in the mean of the {len(fit.rows)} rows it is fitted to"
    )
    if others:
        errors = [abs(step_seconds(row, fit.machine) * 1e3 / row.step_ms - 1) for row in others]
        words += f", {math.fsum(errors) / len(errors):.1%} of the other {len(others)}"
    console.print(Text(words), soft_wrap=True)
