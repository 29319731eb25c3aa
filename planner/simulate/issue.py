"""When each instruction is issued: the host's side of a rank.

A rank's host issues its instructions one after the other, each once what holds up its issue is over
(docs/decisions/0011), and takes its device's time for each. What an instruction only waits for in
its stream does not hold up the host. This module does not know what instructions do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.plan.dependencies import Lists

__all__ = ["IssueClock"]


@dataclass(slots=True, kw_only=True)
class IssueClock:
    """Moments of issue of one rank, found in program order as far as they are asked for."""

    held_by: Lists
    """Per instruction: the tasks that hold up its issue (`PartialOrder.held_by`)."""
    overhead_seconds: float
    _moments: list[float] = field(default_factory=list)

    def moment(self, index: int, ends: Sequence[float]) -> float:
        """When instruction `index` has been issued.

        Args:
            ends: per task, when it is over; those that hold up this instruction must be known.
        """
        moments = self._moments
        for fresh in range(len(moments), index + 1):
            now = moments[-1] if moments else 0.0
            for task in self.held_by[fresh]:
                now = max(now, ends[task])
            moments.append(now + self.overhead_seconds)
        return moments[index]
