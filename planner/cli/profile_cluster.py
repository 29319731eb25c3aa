"""`lga-profile --cluster`: starts the program that measures, and ends with its exit code.

The measuring belongs to the runtime, which this package does not know: it is another program.
"""

import subprocess
import sys

import click

from planner.console import HELP, command_errors

__all__ = ["main"]

_PASSED_ON = {**HELP, "ignore_unknown_options": True, "allow_extra_args": True}


@click.command(context_settings=_PASSED_ON, add_help_option=False)
@click.option("--cluster", is_flag=True, required=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@command_errors()
def main(cluster: bool, options: tuple[str, ...]) -> None:
    """Measure links, collectives and devices between processes; write a cluster file."""
    del cluster
    words = [sys.executable, "-m", "runtime.profile_cluster", *options]
    sys.exit(subprocess.run(words).returncode)
