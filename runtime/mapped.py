"""Room for tensors in files of a folder, which the system keeps in memory as far as there is any.

A file has no name once it is mapped, so it is gone with its tensor, however the run ends. This
module knows files. It does not know what the tensors are of.
"""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from planner.errors import RunError, UsageError

__all__ = ["LEAST_BYTES", "MappedFolder"]

LEAST_BYTES = 1 << 16
"""Smaller tensors stay in memory: a file takes whole pages, and time to make."""


class MappedFolder:
    """A folder for the files of one rank; others may use it too."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if no file can be made in it."""
        self._folder = folder
        if not hasattr(os, "posix_fallocate"):
            raise UsageError(
                "this system cannot reserve room in a file (posix_fallocate)",
                hint="leave out --offload-folder: what is offloaded then stays in memory",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._room(1, torch.uint8)
        except OSError as error:
            raise UsageError(
                f"no file can be made in --offload-folder {folder}: {error.strerror}",
                hint="give a folder on a disk with room, such as /tmp/offload",
            ) from None

    def empty_strided(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """As torch's own, of strides without gaps.

        Raises RunError if the disk has no room for it.
        """
        size = torch.Size(shape).numel()
        if size * dtype.itemsize < LEAST_BYTES:
            return torch.empty_strided(shape, strides, dtype=dtype)
        try:
            return self._room(size, dtype).as_strided(shape, strides)
        except OSError as error:
            raise RunError(
                f"no room for {size * dtype.itemsize} bytes in --offload-folder {self._folder}: "
                f"{error.strerror}",
                hint="a disk with more room, or offload less",
            ) from None

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is where one like it would be put."""
        return tensor.nbytes < LEAST_BYTES or tensor.untyped_storage().filename is not None

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        with NamedTemporaryFile(dir=self._folder, prefix="lga-") as file:
            # Without it a full disk would kill the process, at the first write to a missing page.
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
