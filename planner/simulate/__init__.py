"""From a Plan to its predicted Timeline, step time and memory."""

from planner.simulate.engine import simulate
from planner.simulate.types import MemoryByClass, Simulation

__all__ = ["MemoryByClass", "Simulation", "simulate"]
