"""Every family's order of one placement, as far as it has one.

This module knows which schedules to try, and that some go with few placements only.
"""

import dataclasses
from collections.abc import Iterator

from planner.errors import UsageError
from planner.schedule import Order, order_of
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["family_orders"]

_FAMILIES = (
    Schedule.LAYERED, Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE,
    Schedule.INTERLEAVED, Schedule.HYBRID, Schedule.PLAIN,
)  # fmt: skip


def family_orders(placement: Placement) -> Iterator[tuple[Placement, Order]]:
    """The placement under its own schedule and each family that it goes with, and the order; no
    order twice.

    The hybrid family comes with groups of one, two and four times as many micro-batches as ranks.
    """
    seen: set[Order] = set()
    for found in _under_families(placement):
        try:
            order = order_of(found)
        except UsageError:
            continue
        if order not in seen:
            seen.add(order)
            yield found, order


def _under_families(placement: Placement) -> Iterator[Placement]:
    yield placement
    ranks = placement.num_pipeline_ranks
    for schedule in _FAMILIES:
        for size in (ranks, 2 * ranks, 4 * ranks) if schedule is Schedule.HYBRID else (0,):
            yield dataclasses.replace(placement, schedule=schedule, group_size=size)
