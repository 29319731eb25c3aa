"""What a simulation tells of a plan."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from planner.timeline import Timeline

__all__ = ["MemoryByClass", "MemoryOverTime", "Simulation"]


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
class MemoryOverTime:
    """One rank's memory through a step: a step function."""

    seconds: tuple[float, ...]
    """Moments at which it changes, ascending, from 0."""
    by_class: Mapping[str, tuple[int, ...]]
    """Bytes from each moment on, by field of MemoryByClass."""
    peak_seconds: float
    """The first moment at which the most is held."""
    peak: MemoryByClass
    """Held then."""
    reserved_bytes: int
    """Peak of what the device's allocator takes to serve this; the peak itself without one."""

    @property
    def allocated_bytes(self) -> int:
        """Peak of what is asked of the allocator."""
        return self.peak.total_bytes


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
    stream_seconds: tuple[Mapping[str, float], ...]
    """Per pipeline rank: how long each of its streams works."""
    exposed_seconds: tuple[float, ...]
    """Per pipeline rank: idle time of its compute stream that communication explains, on the path
    of whatever the waiting compute instruction waited for last (`planner.simulate.account`). Other
    ranks' compute on that path is bubble, and what follows the rank's last compute is neither."""
    link_bytes: Mapping[str, float]
    """By name of the port or adapters and direction: bytes per step. A port is that of the busiest
    replica's device; a collective's busiest round stands for all its rounds."""

    link_rates: Mapping[str, float]
    """By the same names: bytes per second; what is never short is left out."""
    exposed_by: tuple[Mapping[str, float], ...]
    """Per pipeline rank: exposed seconds by the opcode of what is waited for, RECEIVE for what a
    transfer takes."""

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
