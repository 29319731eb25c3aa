"""Batches of a run: from the user's dataset, else random ones from example_batch.

Which samples a step sees depends on the seed, the step and the global batch size alone, so no
layout changes them. Every pipeline rank of a replica draws the same batch.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from planner.errors import ModelFileError
from planner.model_file import ModelFile
from planner.plan.types import Plan
from runtime.random import key_of, seeded

__all__ = ["Batches", "Position", "position_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where the data stands before a step."""

    step: int = 0
    epoch: int = 0
    """Times that the dataset was gone through; 0 where batches are random."""
    sample: int = 0
    """Samples taken in this epoch."""


def position_of(values: Mapping[str, Any]) -> Position:
    """From the values that a checkpoint keeps; the start where it was saved with others."""
    names = {field.name for field in fields(Position)}
    return Position(**values) if values.keys() == names else Position()


class Batches:
    """The batch of every step and replica."""

    def __init__(self, model_file: ModelFile, plan: Plan, start: Position | None = None) -> None:
        """
        Args:
            model_file: whose dataset or random batches they are.
            plan: which says how many samples a step takes, and the seed.
            start: where an earlier run stopped, whatever number of samples its steps took.

        Raises:
            ModelFileError: the dataset has no length, or fewer samples than a global batch.
        """
        self._plan = plan
        self._start = start or Position()
        self._example_batch = model_file.example_batch
        self._dataset: Dataset[Any] | None = None
        if model_file.build_dataset is not None:
            self._dataset = model_file.build_dataset()
            self._length = _length(self._dataset, plan.global_batch_size)
        self._orders: dict[int, Tensor] = {}

    @property
    def is_random(self) -> bool:
        """Whether batches are random for want of a dataset."""
        return self._dataset is None

    def batch(self, step: int, replica: int) -> Mapping[str, Tensor]:
        """The samples of one replica in one step, on the CPU."""
        plan = self._plan
        if self._dataset is None:
            key = key_of(plan.options.seed, step, replica)
            with seeded(key, torch.device("cpu")):
                return self._example_batch(plan.replica_batch_size)
        position = self.position(step)
        first = position.sample + replica * plan.replica_batch_size
        indices = self._order(position.epoch)[first : first + plan.replica_batch_size].tolist()
        samples = [self._dataset[index] for index in indices]
        return cast(dict[str, Tensor], default_collate(samples))

    def position(self, step: int) -> Position:
        """Where the data stands before a step that comes at or after the start."""
        if self._dataset is None:
            return Position(step=step)
        start, size = self._start, self._plan.global_batch_size
        steps = step - start.step
        left = max(0, self._length - start.sample) // size
        if steps < left:
            return Position(step=step, epoch=start.epoch, sample=start.sample + steps * size)
        epochs, place = divmod(steps - left, self._length // size)
        return Position(step=step, epoch=start.epoch + 1 + epochs, sample=place * size)

    def _order(self, epoch: int) -> Tensor:
        """The order of all samples in an epoch; the rest that fills no batch is left out."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(key_of(self._plan.options.seed, epoch))
            self._orders = {epoch: torch.randperm(self._length, generator=generator)}
        return self._orders[epoch]


def _length(dataset: Dataset[Any], global_batch_size: int) -> int:
    if not isinstance(dataset, Sized):
        raise ModelFileError(
            f"build_dataset returned a {type(dataset).__name__} without a length",
            hint="return a map-style dataset: __len__ and __getitem__",
        )
    if len(dataset) < global_batch_size:
        raise ModelFileError(
            f"build_dataset returned {len(dataset)} samples, but one step takes "
            f"{global_batch_size}",
            hint="give more samples, or plan with a smaller --batch-size",
        )
    return len(dataset)
