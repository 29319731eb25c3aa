"""From a Plan to its predicted Timeline, step time and memory."""

from planner.simulate.engine import simulate
from planner.simulate.over_time import memory_over_time
from planner.simulate.types import MemoryByClass, MemoryOverTime, Simulation

__all__ = ["MemoryByClass", "MemoryOverTime", "Simulation", "memory_over_time", "simulate"]
