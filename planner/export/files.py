"""Text files that are written whole or not at all, and read with clear refusals.

Knows files. Does not know what is in them.
"""

from pathlib import Path

from planner.errors import UsageError
from planner.files import write_whole

__all__ = ["read_text", "write_text"]


def write_text(path: str | Path, text: str) -> None:
    """Write the file aside, then give it its name.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(path)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="give another path"
        ) from None


def read_text(path: str | Path, *, most_bytes: int, wanted: str) -> str:
    """The whole text of a file of at most `most_bytes`, less a byte order mark; `wanted` says what
    it should be.

    Raises:
        UsageError: it is missing, no file, too large, or not text.
    """
    path = Path(path)
    hint = f"give {wanted}"
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", hint=hint)
        size = path.stat().st_size
        if size > most_bytes:
            raise UsageError(f"{path} has {size} bytes, more than {most_bytes}", hint=hint)
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text", hint=hint) from None
