"""The best order of one step's compute, by CP-SAT over the operations themselves."""

from planner.order.best import OrderFound, OrderTried, Planned, find_order
from planner.order.improve import MAX_LISTED
from planner.order.operations import num_operations

__all__ = [
    "MAX_LISTED",
    "OrderFound",
    "OrderTried",
    "Planned",
    "find_order",
    "num_operations",
]
