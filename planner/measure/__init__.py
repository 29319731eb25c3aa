"""Measure: LayerGraph -> Profile, counted on fake tensors."""

from planner.measure.measure import measure
from planner.measure.split import with_splits

__all__ = ["measure", "with_splits"]
