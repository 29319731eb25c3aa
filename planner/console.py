"""What every command prints through, and how it says that something is wrong.

Knows the terminal. Does not know what any command does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from planner.errors import LgaError

__all__ = ["command_errors", "console", "error_console", "print_error"]

console = Console()
"""Standard output: results."""
error_console = Console(stderr=True)
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
