"""Formulas for time and memory, each with its source. Pure functions of counts and devices."""

from planner.cost.memory import (
    RankBytes,
    StageBytes,
    gather_buffer_bytes,
    gradient_buffer_bytes,
    rank_bytes,
    state_bytes,
    stored_bytes,
    working_bytes,
)
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
    "RankBytes",
    "StageBytes",
    "all_reduce_seconds",
    "gather_buffer_bytes",
    "gather_seconds",
    "gradient_buffer_bytes",
    "layer_seconds",
    "peak_flops",
    "rank_bytes",
    "reduce_scatter_seconds",
    "state_bytes",
    "stored_bytes",
    "transfer_seconds",
    "update_seconds",
    "working_bytes",
]
