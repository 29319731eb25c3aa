"""lga-run: check the inputs, start the plan's ranks on this machine, and say what became of them.

The processes are torch's own elastic launcher's. Knows exit codes and last words; does not know
what a rank does.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from planner.console import HELP, check_can_write, command_errors, print_error
from planner.errors import UsageError
from planner.layouts import Grid
from runtime.failure import LAUNCHED_BY_LGA_RUN, FailureReport, read_report
from runtime.inputs import check_machine, load_inputs
from runtime.options import RunOptions, run_arguments, run_options
from runtime.ranks import rank_name

__all__ = ["launch", "main", "run_ranks"]


@click.command(context_settings=HELP)
@run_arguments
@run_options
@command_errors()
def main(plan_path: Path, model_path: str, **options: Any) -> None:
    """Train MODEL (a .py file or a module) as the plan file PLAN says, on this machine.

    Starts one process for each rank of the plan. For several hosts, start the ranks with
    `torchrun ... -m runtime PLAN MODEL`, which takes the same options.
    """
    sys.exit(launch(plan_path, model_path, RunOptions(**options)))


def launch(plan_path: Path, model_path: str, options: RunOptions) -> int:
    """Run every rank of the plan in a process of its own; returns the exit code.

    Nothing is started unless the plan and the model are sound and belong together.

    Raises:
        UsageError: they are not, this machine lacks the plan's devices, the state cannot be saved
            where it should, or this process is itself a rank of some launcher.
    """
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"lga-run starts the ranks itself, but it is already inside a launcher "
            f"(WORLD_SIZE is {os.environ['WORLD_SIZE']})",
            hint=f"torchrun ... -m runtime {plan_path} {model_path}",
        )
    plan, model_file = load_inputs(plan_path, model_path)
    check_machine(plan, plan.world_size)
    if options.save_path is not None:
        check_can_write(options.save_path, "--save", [plan_path, model_file.path])
    if options.timeline_path is not None:
        check_can_write(options.timeline_path, "--timeline", [plan_path, model_file.path])
    options.adjust(plan)  # to refuse here what every rank would refuse
    words = ["-m", "runtime", str(plan_path), model_path, *options.arguments()]
    return run_ranks(words, plan.grid)


def run_ranks(words: Sequence[str], grid: Grid) -> int:
    """Run `python WORDS` as every rank of a job on this machine; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="lga-run-") as folder:
        config = _prepare(grid.world_size, folder)
        try:
            elastic_launch(config, sys.executable)(*words)
        except ChildFailedError as error:
            return _explain(error.failures, grid)
        except SignalException as error:
            print_error(f"ended by {error.sigval.name}; all ranks are down")
            return 128 + error.sigval
    return 0


def _prepare(world_size: int, folder: str) -> LaunchConfig:
    """Environment of the ranks, and the launcher's settings."""
    os.environ[LAUNCHED_BY_LGA_RUN] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share this machine's cores
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's warnings after a failure
    launcher_log = logging.getLogger("torch.distributed")
    launcher_log.handlers[:] = [logging.NullHandler()]
    launcher_log.propagate = False  # lga-run says it in its own words
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


def _explain(failures: dict[int, ProcessFailure], grid: Grid) -> int:
    """Say which ranks failed of themselves; returns the exit code.

    The launcher lists first what it saw first, then the ranks that it ended because of that.
    """
    reports = {
        rank: read_report(failure.error_file_data, failure.exitcode)
        for rank, failure in failures.items()
    }
    own = {rank: report for rank, report in reports.items() if report and not report.consequence}
    if own:
        messages = {report.message: (rank, report) for rank, report in reversed(own.items())}
        for rank, report in reversed(messages.values()):
            print_error(_placed(rank, report, grid), report.hint)
        return max(report.exit_code for report in own.values())
    for report in filter(None, reports.values()):  # consequences: the first names its cause
        print_error(report.message)
        return 1
    rank, failure = next(iter(failures.items()))
    print_error(*_wordless(rank_name(rank, grid), failure.exitcode))
    return 1


def _placed(rank: int, report: FailureReport, grid: Grid) -> str:
    """With the rank's name, unless the error is the same on every rank or names its rank."""
    name = rank_name(rank, grid)
    if report.exit_code == UsageError.exit_code or name in report.message:
        return report.message
    return f"{name} failed: {report.message}"


def _wordless(name: str, exit_code: int) -> tuple[str, str]:
    """Message and hint for a rank that left no words."""
    if exit_code >= 0:
        return f"{name} ended with exit code {exit_code} and no error", "see its output above"
    try:
        cause = signal.Signals(-exit_code).name
    except ValueError:
        cause = f"signal {-exit_code}"
    if cause == "SIGKILL":
        hint = "see whether the machine ran out of memory (the kernel's log says so)"
    else:
        hint = "see its output above; PYTHONFAULTHANDLER=1 shows where it was"
    return f"{name} was ended by {cause}", hint
