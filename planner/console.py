"""What every command shares: what it prints through, its kinds of numbers, how it refuses.

Knows the terminal and the command line. Does not know what any command does.
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from planner.errors import LgaError, UsageError

__all__ = [
    "DEVICES",
    "HELP",
    "NORM",
    "SAMPLES",
    "SECONDS",
    "SEED",
    "Count",
    "Positive",
    "check_can_write",
    "command_errors",
    "console",
    "error_console",
    "print_error",
]

_LOG_COLUMNS = 140
"""Width of tables in a file or a pipe, where there is no terminal to ask."""


class Count(click.IntRange):
    """A number from 1 to a bound beyond which it is a slip, and planning would take hours."""

    name = "integer"

    def __init__(self, most: int) -> None:
        super().__init__(min=1)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count = int(super().convert(value, param, ctx))
        if count > self.most:
            self.fail(f"{count} is more than the {self.most} that can be planned.", param, ctx)
        return count


class Positive(click.FloatRange):
    """A finite number above 0."""

    def __init__(self, name: str) -> None:
        super().__init__(min=0, min_open=True)
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


DEVICES = Count(1 << 16)
SAMPLES = Count(1 << 24)
"""And whatever else divides them."""
SECONDS = Positive("seconds")
NORM = Positive("norm")
SEED = click.IntRange(0, 2**31 - 1)
"""What both the solver and torch take."""
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of every command."""


def _width(is_terminal: bool) -> int | None:
    """Columns to print; None asks the terminal, or COLUMNS."""
    return None if is_terminal or "COLUMNS" in os.environ else _LOG_COLUMNS


console = Console(width=_width(sys.stdout.isatty()))
"""Standard output: results."""
error_console = Console(stderr=True, width=_width(sys.stderr.isatty()))
"""Standard error: progress and errors."""


@contextmanager
def command_errors() -> Iterator[None]:
    """Turn an LgaError into words on standard error and its exit code, without a traceback.

    Both a context and a decorator; as a decorator it stands below click's own.
    """
    try:
        yield
    except LgaError as error:
        print_error(error.message, error.hint)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(130) from None


def print_error(message: str, hint: str = "") -> None:
    """`error: message`, then `  try: hint`, in colour on a terminal, lines left as they are."""
    text = Text("error: ", style="bold red").append(message, style="not bold default")
    if hint:
        text.append("\n  try: ", style="bold").append(hint, style="not bold default")
    error_console.print(text, soft_wrap=True, highlight=False)


def check_can_write(path: Path, option: str, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse an output file now rather than when the work for it is done.

    `option` is what the user named it with; `inputs` are files that must not be overwritten.

    Raises:
        UsageError: its folder is missing or not writable, or it is no regular file or an input.
    """
    hint = f"give another path with {option}"
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder", hint=hint)
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is no regular file", hint=hint)
    if not path.parent.is_dir():
        raise UsageError(
            f"cannot write {path}: there is no folder {path.parent}",
            hint=f"mkdir -p {path.parent}, or {hint}",
        )
    for other in map(Path, inputs):
        if path.exists() and other.exists() and path.samefile(other):
            raise UsageError(f"cannot write {path}: it is an input of this command", hint=hint)
    try:
        # Asking for permissions is not enough: a file system can be read-only, or no real one.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint=hint) from None
