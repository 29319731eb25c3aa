"""What was measured of a model on a device: the content of a profile file.

It knows figures and where they come from. It does not know how they are measured or stored.
"""

from dataclasses import dataclass
from typing import Literal

from planner.measure.clock import Seconds
from planner.precision import Precision
from planner.profile import LayerProfile

__all__ = ["MeasuredDevice", "MeasuredLayer", "MeasuredModel", "MeasuredSize", "Versions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice:
    """Where it was measured."""

    kind: Literal["cpu", "cuda"]
    name: str
    """As the device calls itself."""
    num_threads: int
    """Of torch on a CPU; 1 on CUDA."""
    num_cores: int
    """That the process could use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Of what the figures depend on."""

    python: str
    torch: str
    cuda: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer, for itself and all layers that are the same computation."""

    signature: str
    layers: tuple[str, ...]
    """Names of the layers it stands for; the profile bears the first."""
    profile: LayerProfile
    """Counts under fake tensors, seconds measured (medians)."""
    forward: Seconds
    backward: Seconds
    recompute: Seconds
    update: Seconds
    optimizer_bytes: int
    """That the optimizer keeps of the layer's parameters between two steps, step counters
    included; parameters that other layers use too count with each of them."""
    forward_peak_bytes: int
    """Measured; the profile's `forward_transient_bytes` is what was counted."""
    backward_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Measured, of forward above the inputs or of backward above what forward kept."""
        return max(self.forward_peak_bytes, self.backward_peak_bytes)

    @property
    def counted_peak_bytes(self) -> int:
        """The same, as it was counted."""
        profile = self.profile
        return max(profile.forward_transient_bytes, profile.backward_transient_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSize:
    """All distinct layers at one micro-batch size."""

    micro_batch_size: int
    layers: tuple[MeasuredLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """One model on one device."""

    model_name: str
    fingerprint: str
    device: MeasuredDevice
    optimizer: str
    """Class of the optimizer whose update was timed."""
    date: str
    versions: Versions
    command: str
    num_repeats: int
    sizes: tuple[MeasuredSize, ...]
    """Ascending."""
    precision: Precision = Precision.MODEL
    keep_float32: tuple[str, ...] = ()
    """Patterns of parameters whose modules were measured in float32 all the same."""
