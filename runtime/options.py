"""The options of a run, as the commands take them and as the ranks get them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from planner.console import SECONDS, SEED
from planner.plan.types import Plan

__all__ = ["RunOptions", "run_arguments", "run_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the user asks of one run of a plan."""

    num_steps: int = 10
    """Optimizer updates."""
    verify: bool = False
    """First compare one planned step with plain accumulation, gradient by gradient."""
    save_path: Path | None = None
    """Where the trained state goes when the run has ended well."""
    timeline_path: Path | None = None
    """Where the times of the last step's instructions go."""
    log_every: int = 1
    """Steps between lines of progress."""
    seed: int | None = None
    """Instead of the plan's."""
    deadline_seconds: float | None = None
    """Longest wait for any transfer or collective, instead of the plan's."""

    def adjust(self, plan: Plan) -> Plan:
        """The plan with the options that this run overrides."""
        options = plan.options
        if self.seed is not None:
            options = replace(options, seed=self.seed)
        if self.deadline_seconds is not None:
            options = replace(options, deadline_seconds=self.deadline_seconds)
        return replace(plan, options=options)

    def arguments(self) -> list[str]:
        """As words of a command line that `run_options` reads back."""
        words = [f"--steps={self.num_steps}", f"--log-every={self.log_every}"]
        words += ["--verify"] if self.verify else []
        words += [] if self.save_path is None else [f"--save={self.save_path}"]
        words += [] if self.timeline_path is None else [f"--timeline={self.timeline_path}"]
        words += [] if self.seed is None else [f"--seed={self.seed}"]
        words += [] if self.deadline_seconds is None else [f"--deadline={self.deadline_seconds!r}"]
        return words


_OPTIONS = (
    click.option(
        "--steps",
        "num_steps",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="Optimizer updates to do.",
    ),
    click.option(
        "--verify",
        is_flag=True,
        help="First compare the losses and gradients of one planned step with plain gradient "
        "accumulation in one process; exit with 1 if they differ.",
    ),
    click.option(
        "--save",
        "save_path",
        type=click.Path(path_type=Path),
        help="Write the trained model's state_dict to this file at the end (torch.load reads it).",
    ),
    click.option(
        "--timeline",
        "timeline_path",
        type=click.Path(path_type=Path),
        help="Write when each instruction of the last step ran, for lga-show --measured.",
    ),
    click.option(
        "--log-every",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Steps between two lines of progress.",
    ),
    click.option(
        "--seed",
        type=SEED,
        help="Of weights, order of samples and dropout  [default: the plan's]",
    ),
    click.option(
        "--deadline",
        "deadline_seconds",
        type=SECONDS,
        help="Longest wait for any transfer between ranks  [default: the plan's]",
    ),
)
_ARGUMENTS = (
    click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path)),
    click.argument("model_path", metavar="MODEL"),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the options of RunOptions, under its field names."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the arguments `plan_path` and `model_path`."""
    for argument in reversed(_ARGUMENTS):
        command = argument(command)
    return command
