"""Formulas for time, each with its source. Pure functions of counts and devices."""

from planner.cost.collectives import (
    all_reduce_seconds,
    gather_seconds,
    num_rounds,
    reduce_scatter_seconds,
)
from planner.cost.seconds import (
    copy_seconds,
    kernel_seconds,
    kernels_seconds,
    layer_seconds,
    peak_flops,
    read_seconds,
    transfer_seconds,
    update_seconds,
)
from planner.cost.tensor import split_layer_seconds, split_profile, tensor_seconds

__all__ = [
    "all_reduce_seconds",
    "copy_seconds",
    "gather_seconds",
    "kernel_seconds",
    "kernels_seconds",
    "layer_seconds",
    "num_rounds",
    "peak_flops",
    "read_seconds",
    "reduce_scatter_seconds",
    "split_layer_seconds",
    "split_profile",
    "tensor_seconds",
    "transfer_seconds",
    "update_seconds",
]
