"""What all tries of the search share: their clock, and what a choice and a split come to."""

import time
from dataclasses import dataclass, field

from planner.solve.choices import Choice
from planner.solve.memory import num_buffers
from planner.solve.types import Placement, Split

__all__ = ["Clock", "placement_of"]


@dataclass(slots=True, kw_only=True)
class Clock:
    """Seconds of the search itself."""

    limit_seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def restart(self, limit_seconds: float) -> None:
        """Begin anew, with so many seconds."""
        self.limit_seconds, self.started = limit_seconds, time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Do not count so many of the seconds that have passed."""
        self.started += seconds

    @property
    def left(self) -> float:
        return self.limit_seconds - self.spent


def placement_of(choice: Choice, split: Split) -> Placement:
    """The placement of a choice and a split."""
    return Placement(
        num_replicas=choice.num_replicas,
        num_pipeline_ranks=choice.num_pipeline_ranks,
        boundaries=split.boundaries,
        stage_ranks=choice.stage_ranks,
        micro_batch_size=choice.micro_batch_size,
        num_micro_batches=choice.num_micro_batches,
        partition=choice.partition,
        recompute=split.recompute,
        num_weight_buffers=num_buffers(choice),
        num_gradient_buffers=num_buffers(choice),
        offload_state=choice.offload_state,
        offload_inputs=choice.offload_inputs,
        layout=choice.layout,
        partition_group_size=choice.partition_group_size if choice.partition else 0,
    )
