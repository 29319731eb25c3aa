"""A batch that knows which of its keys a loss function reads. It knows nothing else."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["WatchedBatch"]


class WatchedBatch(dict[str, torch.Tensor]):
    """A batch that remembers which of its keys are read."""

    def __init__(self, batch: Mapping[str, torch.Tensor]) -> None:
        super().__init__(batch)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Any:
        self.read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        self.read.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()
