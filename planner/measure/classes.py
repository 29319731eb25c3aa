"""The class of an operator: which of a device's rates applies to it.

Named by torch's operator packets, whatever the overload. It does not know devices or layers.
"""

from functools import cache

import torch

from planner.profile import OperatorClass

__all__ = ["operator_class"]

_PARTS: tuple[tuple[OperatorClass, tuple[str, ...]], ...] = (
    (OperatorClass.ATTENTION, ("scaled_dot_product", "flash_attention", "efficient_attention")),
    (
        OperatorClass.NORMALISATION,
        ("layer_norm", "rms_norm", "rmsnorm", "batch_norm", "group_norm"),
    ),
    (OperatorClass.CONVOLUTION, ("convolution",)),
    (OperatorClass.EMBEDDING, ("embedding",)),
)
"""Parts of packet names: backward, backend and fused variants carry their operator's name."""
_PRODUCTS = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr",
    "_addmm_activation", "_int_mm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm",
    "grouped_mm_fallback", "grouped_mm_fallback_backward", "linear", "linear_backward",
    "mkldnn_linear", "matmul", "matmul_backward",
})  # fmt: skip


@cache
def operator_class(func: torch._ops.OpOverload) -> OperatorClass:
    """The class of an operator as a `TorchDispatchMode` sees it."""
    name = func._overloadpacket._qualified_op_name.rpartition("::")[2]
    if name in _PRODUCTS:
        return OperatorClass.PRODUCT
    for kind, parts in _PARTS:
        if any(part in name for part in parts):
            return kind
    return OperatorClass.ELEMENTWISE
