"""Measure: LayerGraph -> Profile, counted on fake tensors."""

from planner.measure.measure import measure

__all__ = ["measure"]
