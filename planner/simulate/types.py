"""What a simulation tells of a plan."""

from dataclasses import dataclass, fields

from planner.timeline import Timeline

__all__ = ["MemoryByClass", "Simulation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryByClass:
    """Bytes of one rank at one moment, by what holds them."""

    weights: int = 0
    """This rank's shards, or its whole weights where nothing is partitioned."""
    gradients: int = 0
    """Accumulation buffers, and gradients reduced but not yet applied."""
    optimizer: int = 0
    stored_inputs: int = 0
    """Boundary tensors, their gradients, and batches."""
    activations: int = 0
    """Saved inside stages for backward."""
    buffers: int = 0
    """Gather buffers of a partitioned state."""
    transient: int = 0
    """Taken and given back by the running compute instruction."""

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One step of a plan on a cluster."""

    timeline: Timeline
    busy_seconds: tuple[float, ...]
    """Per pipeline rank: how long its compute stream works."""
    tail_seconds: float
    """From the last BACKWARD of any rank to the end of the step: nothing hides it."""
    sent_bytes: tuple[int, ...]
    """Per pipeline rank and replica: boundary tensors and gradients sent, gathers and reductions
    not included."""
    memory: tuple[MemoryByClass, ...]
    """Per pipeline rank: the most that any interleaving can hold."""

    @property
    def step_seconds(self) -> float:
        return self.timeline.step_seconds

    @property
    def bubble(self) -> float:
        """Idle part of the compute streams: 1 - busy / (ranks x step)."""
        available = len(self.busy_seconds) * self.step_seconds
        return 1.0 - sum(self.busy_seconds) / available if available else 0.0

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per pipeline rank."""
        return tuple(moment.total_bytes for moment in self.memory)
