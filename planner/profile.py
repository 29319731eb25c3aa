"""The Profile: what each layer costs at one micro-batch size, in counts that fit any device.

Counts are exact under fake tensors; seconds appear only where they were measured. The roofline
that turns counts into seconds lives in `planner.cost`.
"""

from dataclasses import dataclass

__all__ = ["LayerProfile", "OperatorCount", "Profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCount:
    """Kernels of one layer that are alike: same flop, bytes and type."""

    flop: int
    """Of one kernel; 0 where the operator is not a matrix product, convolution or attention."""
    moved_bytes: int
    """Read and written by one kernel, each distinct tensor once."""
    dtype: str
    num_kernels: int
    draws: bool = False
    """Whether it draws random numbers, which costs a CPU more than moving the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Counts of one layer for one micro-batch."""

    name: str
    forward: tuple[OperatorCount, ...]
    backward: tuple[OperatorCount, ...]
    parameter_bytes: int
    """Of every parameter it uses, tied ones included."""
    saved_bytes: int
    """Kept from forward for backward: storages that are not inputs, outputs or parameters."""
    saved_tensors: tuple[str, ...]
    """Inputs and outputs (boundary tensors, batch keys) also kept, by name."""
    forward_transient_bytes: int
    """Peak of live bytes during forward above the inputs, everything else it makes included."""
    backward_transient_bytes: int
    """Peak of live bytes during backward above what forward kept, parameter gradients excluded."""
    forward_seconds: float | None = None
    """Measured, where a device was at hand."""
    backward_seconds: float | None = None
    backward_weight_seconds: float | None = None
    """The part of backward that makes gradients of parameters, for schedules that split it.
    None: modelled as half of backward where a parameter is trained, nothing elsewhere."""
    provenance: str = "counted under fake tensors"

    @property
    def forward_flop(self) -> int:
        return sum(count.flop * count.num_kernels for count in self.forward)

    @property
    def backward_flop(self) -> int:
        return sum(count.flop * count.num_kernels for count in self.backward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One LayerProfile per layer of a LayerGraph, at its micro-batch size."""

    micro_batch_size: int
    layers: tuple[LayerProfile, ...]
