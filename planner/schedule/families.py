"""Which function makes the order of which schedule."""

from collections.abc import Callable, Mapping

from planner.errors import UsageError
from planner.schedule.alternating import (
    hybrid_order,
    interleaved_order,
    one_f_one_b_order,
    zero_bubble_order,
)
from planner.schedule.layered import forward_order, gpipe_order, layered_order, plain_order
from planner.schedule.order import Order
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["order_of"]

_FAMILIES: Mapping[Schedule, Callable[[Placement], Order]] = {
    Schedule.LAYERED: layered_order,
    Schedule.GPIPE: gpipe_order,
    Schedule.ONE_F_ONE_B: one_f_one_b_order,
    Schedule.INTERLEAVED: interleaved_order,
    Schedule.HYBRID: hybrid_order,
    Schedule.ZERO_BUBBLE: zero_bubble_order,
    Schedule.PLAIN: plain_order,
    Schedule.FORWARD: forward_order,
}


def order_of(placement: Placement) -> Order:
    """The order of compute that the placement's schedule asks for.

    Raises:
        UsageError: the schedule cannot be followed with the placement's stages, ranks or
            micro-batches, or is a custom one, which no rule makes.
    """
    if placement.schedule not in _FAMILIES:
        raise UsageError(
            f"no rule makes the order of a {placement.schedule.value} schedule",
            hint="give the order itself, or name one of: "
            + ", ".join(schedule.value for schedule in _FAMILIES),
        )
    return _FAMILIES[placement.schedule](placement)
