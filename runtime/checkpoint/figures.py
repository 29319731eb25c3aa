"""Finds checkpoints, and reads their plain values. Nothing that is read can run code.

Torch's own modules for checkpoints take long to import, and a run that neither saves nor resumes
does without: so this module knows files, and not what is in tensors.
"""

from pathlib import Path
from typing import Any

import torch

from planner.errors import UsageError

__all__ = ["FIGURES", "METADATA", "damaged", "find_checkpoint", "read_figures"]

FIGURES = "training.pt"
"""The file of plain values."""
METADATA = ".metadata"
"""The file that torch's reader looks for first; written last."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the last one in a folder of checkpoints.

    Raises:
        UsageError: there is none.
    """
    if (path / METADATA).is_file():
        return path
    found = [file.parent for file in path.glob(f"*/{METADATA}")]
    whole = [folder for folder in found if not folder.name.startswith(".")]
    if not whole:
        what = "no whole checkpoint" if path.exists() else "nothing"
        raise UsageError(
            f"there is {what} at {path}",
            hint="give a folder that --save-every or Executor.save has written",
        )
    return max(whole, key=lambda folder: (read_figures(folder)["num_steps"], folder.name))


def read_figures(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        UsageError: it is missing or damaged.
    """
    try:
        found = torch.load(folder / FIGURES, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make pickle do
        raise damaged(folder, error) from None
    if not isinstance(found, dict) or not isinstance(found.get("num_steps"), int):
        raise damaged(folder, ValueError(f"{FIGURES} is of another program"))
    return found


def damaged(folder: Path, error: BaseException) -> UsageError:
    """The error of a checkpoint that is not whole."""
    reason = str(error).strip("'\"").split("\n")[0] or type(error).__name__
    return UsageError(
        f"{folder} is no whole checkpoint: {reason}",
        hint="give a folder that --save-every or Executor.save has written",
    )
