"""Profile + Cluster -> Placement: where every layer runs, in how many stages and micro-batches."""

from planner.solve.orders import best_order
from planner.solve.problem import Constraints, Problem, Simulated
from planner.solve.search import Progress, solve
from planner.solve.types import Candidate, Placement, Solution

__all__ = [
    "Candidate",
    "Constraints",
    "Placement",
    "Problem",
    "Progress",
    "Simulated",
    "Solution",
    "best_order",
    "solve",
]
