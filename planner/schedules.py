"""The names of the orders of compute that a plan can follow.

This module knows names. The orders themselves are made by `planner.schedule`.
"""

from enum import StrEnum

__all__ = ["OrderSearch", "Schedule"]


class Schedule(StrEnum):
    """Which order of compute the programs follow. All use the same instructions."""

    LAYERED = "layered"
    """All micro-batches through a stage before the next, forward and backward (rule 3)."""
    GPIPE = "gpipe"
    """All forwards, then all backwards, one stage per rank (Huang et al., NeurIPS 2019)."""
    ONE_F_ONE_B = "1f1b"
    """One stage per rank, forward and backward alternate (Narayanan et al., SOSP 2019)."""
    INTERLEAVED = "interleaved"
    """Depth-first: several stages per rank, P micro-batches at a time (SC 2021)."""
    HYBRID = "hybrid"
    """As interleaved, but with groups of any size: P is depth-first, M breadth-first."""
    ZERO_BUBBLE = "zb-h1"
    """1F1B with backward split in two (Qi et al., ICLR 2024)."""
    PLAIN = "plain"
    """Each micro-batch through all stages and back before the next: plain accumulation."""
    FORWARD = "forward"
    """No backward: evaluation."""
    CUSTOM = "custom"
    """An order that came from elsewhere."""


class OrderSearch(StrEnum):
    """Which orders are searched where no family's rule makes it."""

    BEST = "best"
    """All of them."""
    BEST_LAYERED = "best-layered"
    """Those in which a rank ends the backward pass of all micro-batches through a stage before it
    begins that of any preceding one."""
