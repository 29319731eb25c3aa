"""Profile + Cluster -> Placement: where every layer runs, in how many stages and micro-batches."""

from planner.solve.problem import Constraints, Problem, Simulated
from planner.solve.search import solve
from planner.solve.types import Candidate, Placement, Solution

__all__ = ["Candidate", "Constraints", "Placement", "Problem", "Simulated", "Solution", "solve"]
