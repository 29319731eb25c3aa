"""Weights of micro-batches in the step's loss: the number of tokens that count, say.

The step's loss is sum(loss * weight) / sum(weight) over all micro-batches of all replicas, so a
mean over tokens stays one however they are spread. The sum over replicas is found while forward
runs. This module knows the batch and the user's function. It does not know when anything runs.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from planner.errors import UsageError
from planner.plan.types import Plan
from runtime.transport import Pending, Transport

__all__ = ["LossWeight", "LossWeights", "weight_of", "weighted_mean"]

LossWeight = Callable[[Mapping[str, Tensor]], Tensor | float]
"""A micro-batch's samples -> how much its loss counts."""


class LossWeights:
    """The weights of one step, on a rank that computes the loss."""

    def __init__(self, plan: Plan, transport: Transport, function: LossWeight) -> None:
        self._plan, self._transport, self._function = plan, transport, function
        self.of_micro_batches: tuple[float, ...] = ()
        self._total = torch.zeros(1, dtype=torch.float64)
        self._pending: Pending | None = None

    def begin(
        self, batch: Mapping[str, Tensor], device: torch.device, *, is_evaluation: bool
    ) -> None:
        """Weigh the micro-batches of this replica, and start to add up those of all.

        Raises:
            UsageError: a weight is no number, or negative.
        """
        size = self._plan.micro_batch_size
        rows = (
            {key: value[m * size : (m + 1) * size] for key, value in batch.items()}
            for m in range(self._plan.num_micro_batches)
        )
        self.of_micro_batches = tuple(weight_of(self._function, samples) for samples in rows)
        # Filled on the device: a copy of it would make the process wait.
        total = sum(self.of_micro_batches)
        self._total = torch.full((1,), total, dtype=torch.float64, device=device)
        self._pending = None
        if not is_evaluation:  # which needs no total: nothing flows back
            self._pending = self._transport.all_reduce(self._total, "the weights of the losses")

    def root(self, loss: Tensor, micro_batch: int) -> Tensor:
        """What backward starts from."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        total = self._total[0]
        share = torch.where(total > 0, self.of_micro_batches[micro_batch] / total, 0.0)
        return share.to(loss.dtype).expand_as(loss)


def weight_of(function: LossWeight, samples: Mapping[str, Tensor]) -> float:
    """The weight of one micro-batch.

    Raises:
        UsageError: it is no number, or negative.
    """
    weight = function(samples)
    if not isinstance(weight, Tensor) or weight.numel() == 1:
        number = float(weight)
        if math.isfinite(number) and number >= 0:
            return number
    raise UsageError(
        f"loss_weight returned {weight!r:.60}, not one number of at least 0",
        hint="return how many tokens count: (batch['labels'] != -100).sum()",
    )


def weighted_mean(losses: tuple[Tensor, ...], weights: tuple[float, ...]) -> float:
    """The mean of some losses; of equal weight without weights. What weighs nothing is left out,
    for the mean over no tokens is no number."""
    if not weights:
        return float(torch.stack(losses).double().mean())
    pairs = [(float(x), w) for x, w in zip(losses, weights, strict=True) if w]
    return sum(x * w for x, w in pairs) / sum(weights) if pairs else math.nan
