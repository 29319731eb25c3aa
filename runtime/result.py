"""What a step gives back. Figures of a device are read when they are asked for, not before.

This module knows figures. It does not know what made them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from planner.timeline import Event, Timeline
from runtime.loss_weights import weighted_mean
from runtime.streams import Figure, Moments

__all__ = ["StepResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step, or one evaluation, on one rank."""

    losses: tuple[Tensor, ...]
    """Loss of each micro-batch of this replica; empty on ranks without the last stage."""
    rank: int
    """Pipeline rank."""
    measured: Moments
    """When its instructions ran."""
    finite: bool | None = None
    """Whether every gradient on every rank was finite; if not, nothing was updated anywhere. None
    where the plan does not check it."""
    not_finite: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Where it was not: parameter -> the world ranks whose part of its gradient was not, on every
    rank alike."""
    norm: Figure | None = None
    """Reads `gradient_norm`."""
    weights: tuple[float, ...] = ()
    """Of each micro-batch in the step's loss, where the user weighs them."""
    learning_rate: float | None = None
    """That this step's update used, of the rank's first parameter group; None where the rank
    trains nothing, and of an evaluation."""

    @property
    def loss(self) -> float | None:
        """Mean over this replica's micro-batches, None where the last stage is elsewhere."""
        return weighted_mean(self.losses, self.weights) if self.losses else None

    @property
    def gradient_norm(self) -> float | None:
        """Of the whole model, before clipping; None where the plan does not clip."""
        return None if self.norm is None else float(self.norm())

    @property
    def moments(self) -> tuple[float, ...]:
        """In seconds: the start of the step, then start and end of each instruction. On a CPU of
        this process's clock; on a GPU its events', from the first, and waited for here."""
        return self.measured.seconds()

    @property
    def timeline(self) -> Timeline:
        """Measured, from the start of the step."""
        origin, *moments = self.moments
        pairs = zip(moments[::2], moments[1::2], strict=True)
        events = (
            Event(rank=self.rank, index=i, start_seconds=start - origin, end_seconds=end - origin)
            for i, (start, end) in enumerate(pairs)
        )
        return Timeline(source="measured", events=tuple(events))
