"""Commands as users start them: in a process and a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["command"]

TOOLS = Path(sys.executable).parent


def command(
    folder: Path, *words: str, timeout_seconds: float = 200.0
) -> "subprocess.CompletedProcess[str]":
    """Run a command of the project, or of Python, such as `lga-run` or `torchrun`."""
    return subprocess.run(
        [str(TOOLS / words[0]), *words[1:]],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
