"""Files that are written whole or not at all, and text that is read with clear refusals.

This module knows files. It does not know what is in them.
"""

import errno
import os
import tempfile
from pathlib import Path

from planner.errors import UsageError

__all__ = ["read_text", "write_text", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write the file aside, then give it its name; a link goes on pointing to it.

    Raises:
        OSError: it cannot be written, or it is a device or a pipe; what was there before still is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # as root, the renaming would replace /dev/null
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def write_text(path: str | Path, text: str, *, hint: str = "give another path") -> None:
    """`write_whole` for text, with a refusal that a user can read.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(path)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint=hint) from None


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
