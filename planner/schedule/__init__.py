"""From a Placement to an Order of compute steps per pipeline rank."""

from planner.schedule.families import order_of
from planner.schedule.layered import forward_order, layered_order
from planner.schedule.order import ComputeStep, Order, require_complete

__all__ = ["ComputeStep", "Order", "forward_order", "layered_order", "order_of", "require_complete"]
