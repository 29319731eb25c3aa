"""Files that are written whole or not at all.

This module knows files. It does not know what is in them.
"""

import errno
import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


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
