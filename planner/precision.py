"""Mixed precision: which types a model computes in, and what it keeps of every parameter.

In mixed precision a step computes on a copy of the parameters in a type of two bytes, with
activations and boundary tensors of that type; master weights, sums of gradients over micro-batches
and the optimizer's state stay in float32. This module knows types and bytes. It does not know
optimizers.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from planner.graph import DTYPE_BYTES, LayerGraph, ParameterSpec

__all__ = ["ParameterState", "Precision", "parameter_state", "with_masters"]

_MASTER = "float32"


class Precision(StrEnum):
    """Types that a model trains in."""

    MODEL = "model"
    """As the model file builds it, all of it."""
    BFLOAT16 = "bfloat16"
    """Mixed: computes in bfloat16."""
    FLOAT16 = "float16"
    """Mixed: computes in float16."""

    @property
    def is_mixed(self) -> bool:
        return self is not Precision.MODEL

    @property
    def compute_dtype(self) -> str | None:
        """What floating parameters, buffers and batches turn into; None: they stay."""
        return self.value if self.is_mixed else None

    def master_dtype(self, dtype: str) -> str:
        """What a parameter that computes in `dtype` is kept and updated in."""
        return _MASTER if self.is_mixed and dtype == self.compute_dtype else dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """Bytes of one parameter, whole, wherever its parts lie."""

    compute_bytes: int
    """The copy that layers compute with."""
    master_bytes: int
    """0 where the compute copy is the only one."""
    gradient_bytes: int
    """Its gradient, summed over micro-batches."""
    optimizer_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.compute_bytes + self.master_bytes + self.gradient_bytes + self.optimizer_bytes


def parameter_state(
    parameter: ParameterSpec, precision: Precision, optimizer_bytes: int
) -> ParameterState:
    """The state of a parameter of a graph traced in this precision.

    Frozen parameters have their compute copy alone. `optimizer_bytes` is what the optimizer keeps
    of this parameter, were it trained.
    """
    num_elements = math.prod(parameter.shape)
    if not parameter.trainable:
        return ParameterState(
            compute_bytes=parameter.num_bytes, master_bytes=0, gradient_bytes=0, optimizer_bytes=0
        )
    master = precision.master_dtype(parameter.dtype)
    master_bytes = num_elements * DTYPE_BYTES[master]
    return ParameterState(
        compute_bytes=parameter.num_bytes,
        master_bytes=0 if master == parameter.dtype else master_bytes,
        gradient_bytes=master_bytes,
        optimizer_bytes=optimizer_bytes,
    )


def with_masters(graph: LayerGraph, precision: Precision) -> LayerGraph:
    """A graph traced in this precision, its trained parameters those that are kept and updated.

    Each names the type of its compute copy where that is another. Frozen ones have that copy alone.
    """
    if not precision.is_mixed:
        return graph
    return replace(
        graph, parameters=tuple(_master(parameter, precision) for parameter in graph.parameters)
    )


def _master(parameter: ParameterSpec, precision: Precision) -> ParameterSpec:
    master = precision.master_dtype(parameter.dtype)
    if not parameter.trainable or master == parameter.dtype:
        return parameter
    return replace(parameter, dtype=master, compute_dtype=parameter.dtype)
