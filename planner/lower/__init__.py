"""From a Placement to the instruction program of every rank."""

from planner.lower.program import lower

__all__ = ["lower"]
