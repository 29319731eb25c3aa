"""Formulas for time, each with its source. Pure functions of counts and devices."""

from planner.cost.seconds import (
    all_reduce_seconds,
    gather_seconds,
    layer_seconds,
    peak_flops,
    reduce_scatter_seconds,
    transfer_seconds,
    update_seconds,
)

__all__ = [
    "all_reduce_seconds",
    "gather_seconds",
    "layer_seconds",
    "peak_flops",
    "reduce_scatter_seconds",
    "transfer_seconds",
    "update_seconds",
]
