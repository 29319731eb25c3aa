"""The Timeline: when each instruction ran. Planned and measured ones share this schema."""

from dataclasses import dataclass

__all__ = ["Event", "Timeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One instruction of one pipeline rank, in seconds from the start of the step."""

    rank: int
    index: int
    """Position in the rank's program."""
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Events of one step, ordered by (rank, index)."""

    source: str
    """`simulated` or `measured`."""
    events: tuple[Event, ...]

    @property
    def step_seconds(self) -> float:
        return max((event.end_seconds for event in self.events), default=0.0)
