"""The Profile: what each layer costs at one micro-batch size, in counts that fit any device.

Counts are exact under fake tensors; seconds appear only where they were measured. The roofline
that turns counts into seconds lives in `planner.cost`.
"""

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "LayerMemory", "LayerProfile", "LayerSplit", "Moment", "OperatorClass", "OperatorCount",
    "Profile",
]  # fmt: skip


class OperatorClass(StrEnum):
    """Operators that a device runs alike: one rate of compute and of memory fits each class."""

    PRODUCT = "product"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    NORMALISATION = "normalisation"
    EMBEDDING = "embedding"
    ELEMENTWISE = "elementwise"
    """Everything else: softmax, copies, reductions, casts."""


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
    kind: OperatorClass = OperatorClass.ELEMENTWISE
    split: bool = False
    """Whether tensor parallelism divides this kernel among its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplit:
    """What tensor parallelism divides of a layer, besides kernels: shares of what is whole."""

    parameters: tuple[str, ...]
    """Names of the parameters of which every rank holds a part."""
    parameter_bytes: int
    tensors: tuple[str, ...]
    """Boundary tensors that stay split between layers."""
    saved_share: float
    """Of the saved bytes."""
    forward_peaks: tuple[tuple[float, float], ...]
    """(whole, split) parts of the transient peak at the moments that may be the peak of a rank."""
    backward_peaks: tuple[tuple[float, float], ...]
    pieces: int
    """Degrees must divide this number (of heads, say); 0: any degree, with padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A peak of one run, and what else the run held then."""

    peak_bytes: int
    """Of what the run made, above what it found."""
    held: tuple[str, ...]
    """Given to the run and not let go of yet: boundary tensors, in backward also gradients of
    outputs (`gradient:` and the name)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """What decides the memory of a stage beside the sums and peaks of its layers alone."""

    prologue: tuple[tuple[str, int], ...]
    """What prologue statements make for it: (statement and position, bytes). A stage makes them at
    its begin, for all its layers."""
    saved_prologue: tuple[tuple[str, int], ...]
    """Those of the saved bytes that prologue statements made: kept once for all of a stage."""
    output_storages: tuple[tuple[str, int], ...]
    """Per output, what owns its storage (itself, an input, a batch key, a prologue statement and
    position, nothing where it is the model's own) and the bytes of that storage."""
    forward: tuple[Moment, ...]
    """In time order, rising: whatever a stage counts of what is held, its peak is at one of them.
    Inputs are given."""
    unsaved: tuple[Moment, ...]
    """The same of a forward that saves nothing, as before recompute."""
    backward: tuple[Moment, ...]
    """Given are gradients of outputs, and inputs and outputs that backward reads."""
    passed_gradients: tuple[tuple[str, str], ...]
    """(input, output): the input's gradient is the output's, or a part of it in place."""
    changed_buffer_bytes: int
    """Of buffers that forward changes: recompute needs them as they were before."""
    inner_backward: tuple[Moment, ...] | None = None
    """As `backward`, where the gradients of all outputs come from later layers of the stage, in
    the layouts in which those make them; None where these are the outputs' own."""


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
    """Peak of live bytes during backward above what forward kept and gradients given to it; sums
    of parameter gradients excluded."""
    memory: LayerMemory | None = None
    """What a stage of several layers needs beside these; None: figures are of the layer alone."""
    forward_seconds: float | None = None
    """Measured, where a device was at hand."""
    backward_seconds: float | None = None
    backward_weight_seconds: float | None = None
    """The part of backward that makes gradients of parameters, for schedules that split it.
    None: modelled as half of backward where a parameter is trained, nothing elsewhere."""
    recompute_seconds: float | None = None
    """Measured forward with what it saves, from stored inputs; None: as the forward."""
    update_seconds: float | None = None
    """Measured optimizer step of its parameters."""
    forward_all_reduce_bytes: tuple[int, ...] = ()
    """What tensor parallelism of any degree above one adds to forward: one entry per all-reduce."""
    backward_all_reduce_bytes: tuple[int, ...] = ()
    split: LayerSplit | None = None
    """None: not analysed."""
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
