"""From a Placement to an Order of compute steps per pipeline rank."""

from planner.schedule.order import ComputeStep, Order, layered_order

__all__ = ["ComputeStep", "Order", "layered_order"]
