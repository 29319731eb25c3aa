"""The options of a run, as the commands take them and as the ranks get them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from planner.console import SECONDS, SEED
from planner.errors import UsageError
from planner.plan.types import Plan
from runtime.backends import DEFAULT_BACKEND, check_backend
from runtime.checkpoint import read_info

__all__ = ["RunOptions", "run_arguments", "run_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the user asks of one run of a plan."""

    num_steps: int = 10
    """Optimizer updates in all, those before a checkpoint that is resumed included."""
    verify: bool = False
    """First compare one planned step with plain accumulation, gradient by gradient."""
    save_path: Path | None = None
    """Where the trained state goes when the run has ended well."""
    save_every: int | None = None
    """Steps between checkpoints; the last step leaves one too."""
    checkpoint_folder: Path = Path("checkpoints")
    """Where they go, each in a folder of its own."""
    resume_path: Path | None = None
    """A checkpoint to go on from, or a folder of checkpoints."""
    offload_folder: Path | None = None
    """Where what the plan offloads is in files, instead of in host memory."""
    compile_backend: str | None = None
    """Of torch.compile, for what stages call; None: stages run eagerly."""
    timeline_path: Path | None = None
    """Where the times of the last step's instructions go."""
    log_every: int = 1
    """Steps between lines of progress."""
    seed: int | None = None
    """Instead of the plan's."""
    deadline_seconds: float | None = None
    """Longest wait for any transfer or collective, instead of the plan's."""

    def adjust(self, plan: Plan) -> Plan:
        """The plan with the options that this run overrides; a run resumed keeps its seed.

        Raises:
            UsageError: the options contradict each other, the plan or the checkpoint to resume.
        """
        options = plan.options
        if self.offload_folder is not None:
            _check_offloads(plan)
        if self.compile_backend is not None:
            device = torch.device("cuda" if plan.backend == "nccl" else "cpu")
            check_backend(self.compile_backend, device)
        if self.seed is not None:
            options = replace(options, seed=self.seed)
        if self.resume_path is not None:
            options = replace(options, seed=self._resumed(self.resume_path))
        if self.deadline_seconds is not None:
            options = replace(options, deadline_seconds=self.deadline_seconds)
        return replace(plan, options=options)

    def _resumed(self, path: Path) -> int:
        """The seed of the run to be resumed."""
        info = read_info(path)
        if self.verify:
            raise UsageError(
                "--verify compares the first step from fresh weights, and --resume has none",
                hint="leave one of them out",
            )
        if self.seed not in (None, info.seed):
            raise UsageError(
                f"--seed is {self.seed}, but {info.path} is of a run with seed {info.seed}",
                hint="leave --seed out: the run goes on with its own",
            )
        if info.num_steps >= self.num_steps:
            raise UsageError(
                f"{info.path} was written after {info.num_steps} steps, and --steps is "
                f"{self.num_steps}",
                hint=f"--steps counts from the start of the run: --steps {info.num_steps + 10}",
            )
        return info.seed

    def arguments(self) -> list[str]:
        """As words of a command line that `run_options` reads back."""
        words = [f"--steps={self.num_steps}", f"--log-every={self.log_every}"]
        words += ["--verify"] if self.verify else []
        words += [] if self.save_path is None else [f"--save={self.save_path}"]
        words += [] if self.save_every is None else [f"--save-every={self.save_every}"]
        words += [f"--checkpoints={self.checkpoint_folder}"]
        words += [] if self.resume_path is None else [f"--resume={self.resume_path}"]
        folder = self.offload_folder
        words += [] if folder is None else [f"--offload-folder={folder}"]
        words += [] if self.compile_backend is None else [f"--compile={self.compile_backend}"]
        words += [] if self.timeline_path is None else [f"--timeline={self.timeline_path}"]
        words += [] if self.seed is None else [f"--seed={self.seed}"]
        words += [] if self.deadline_seconds is None else [f"--deadline={self.deadline_seconds!r}"]
        return words


def _check_offloads(plan: Plan) -> None:
    if not any(buffer.name.startswith("host:") for table in plan.buffers for buffer in table):
        raise UsageError(
            "--offload-folder is given, and the plan offloads nothing",
            hint="plan with --offload-state or --offload-inputs, or leave it out",
        )


def _read_backend(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """`lga-run --compile PLAN MODEL` would take the plan for a backend."""
    if value is not None and not value.isidentifier():
        raise click.BadParameter(
            f"{value!r} is no backend of torch.compile: write --compile={DEFAULT_BACKEND}, or "
            "--compile after PLAN and MODEL"
        )
    return value


_OPTIONS = (
    click.option(
        "--steps",
        "num_steps",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="Optimizer updates to do, those before --resume included.",
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
        "--save-every",
        type=click.IntRange(min=1),
        metavar="STEPS",
        help="Write a checkpoint after every so many steps, and after the last.",
    ),
    click.option(
        "--checkpoints",
        "checkpoint_folder",
        type=click.Path(path_type=Path),
        default=Path("checkpoints"),
        show_default=True,
        help="Folder of the checkpoints: each is a folder step-N, written by "
        "torch.distributed.checkpoint.",
    ),
    click.option(
        "--resume",
        "resume_path",
        type=click.Path(path_type=Path),
        help="Go on from this checkpoint, or from the last one in this folder, whatever plan of "
        "the same model wrote it.",
    ),
    click.option(
        "--offload-folder",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep what the plan offloads in files of this folder instead of in host memory, which "
        "may then be smaller; on a GPU copies are slower, as their memory is not pinned.",
    ),
    click.option(
        "--compile",
        "compile_backend",
        is_flag=False,
        flag_value=DEFAULT_BACKEND,
        metavar="[BACKEND]",
        callback=_read_backend,
        help="Compile the model's layers and its loss with torch.compile before the first step; "
        f"BACKEND is {DEFAULT_BACKEND} unless given as --compile=BACKEND.",
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
