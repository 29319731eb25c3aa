"""Which stages run forward again, for given boundaries: as little as memory allows.

A rank's memory does not depend on the other ranks' recompute, so all ranks are decided together:
each takes its cheapest stages, as many as it needs. This module knows the Instance alone.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planner.solve.instance import Cuts, Flags, Instance, rank_units, rank_units_of_many
from planner.solve.types import Split

__all__ = ["choose_recompute"]

Stages = NDArray[np.int64]
"""A column per rank, its stages ascending; -1 below the last where others have more."""


def choose_recompute(
    instance: Instance,
    boundaries: tuple[int, ...],
    units_of_many: Callable[[Cuts, Flags], Cuts] | None = None,
) -> Split:
    """The boundaries with recompute where memory asks for it; it may not fit even so.

    `units_of_many` says what memory the ranks need, where that is not as in the layered order.
    """
    split = instance.choice.split(boundaries)
    if instance.choice.recompute is not None:
        return split
    units_of = partial(_units, units_of_many or partial(rank_units_of_many, instance), boundaries)
    is_layered = units_of_many is None  # then one split alone is faster asked for
    units = rank_units(instance, split) if is_layered else units_of(np.array([split.recompute]))[0]
    if all(used <= limit for used, limit in zip(units, instance.limit_units, strict=True)):
        return split
    stages = _stages(instance)
    turns, ranks = stages.shape
    order = _cheapest_first(instance, boundaries, stages, units_of)
    # Row n: the n cheapest stages of every rank.
    places = np.argsort(order, axis=0)
    flags = np.stack([_of_stages(instance, stages, places < turn) for turn in range(turns + 1)])
    fits = units_of(flags) <= np.array(instance.limit_units)
    numbers = np.where(fits.any(axis=0), fits.argmax(axis=0), turns)
    chosen = places < numbers[None, :]
    # What a later, larger stage spares may have made an earlier one's recompute needless.
    row = np.arange(turns)[:, None]
    without = np.stack([_of_stages(instance, stages, chosen & (row != turn)) for turn in row[:, 0]])
    fits = units_of(without) <= np.array(instance.limit_units)
    spared = np.where(fits & chosen, _seconds(instance, boundaries, stages), -1).argmax(axis=0)
    needless = (fits & chosen)[spared, np.arange(ranks)]
    chosen[spared, np.arange(ranks)] &= ~needless
    recompute = _of_stages(instance, stages, chosen)
    return Split(boundaries=boundaries, recompute=tuple(recompute.tolist()))


def _stages(instance: Instance) -> Stages:
    own = instance.pace.own
    found = np.full((max(map(len, own)), len(own)), -1, dtype=np.int64)
    for rank, stages in enumerate(own):
        found[: len(stages), rank] = stages
    return found


def _of_stages(instance: Instance, stages: Stages, flags: Flags) -> Flags:
    """Flags per stage, from flags by rank and turn."""
    found = np.zeros(len(instance.pace.stage_ranks), dtype=np.bool_)
    found[stages[stages >= 0]] = flags[stages >= 0]
    return found


def _seconds(instance: Instance, boundaries: tuple[int, ...], stages: Stages) -> Stages:
    """Ticks of each stage's second forward; 0 where there is no stage."""
    again = np.diff(np.array(instance.again)[list(boundaries)])
    return np.where(stages >= 0, again[stages], 0)


def _units(
    units_of_many: Callable[[Cuts, Flags], Cuts], boundaries: tuple[int, ...], flags: Flags
) -> Cuts:
    """Memory of each rank, for each row of flags."""
    return units_of_many(np.repeat(np.array([boundaries]), len(flags), axis=0), flags)


def _cheapest_first(
    instance: Instance,
    boundaries: tuple[int, ...],
    stages: Stages,
    units_of: Callable[[Flags], Cuts],
) -> NDArray[np.int64]:
    """Per rank (a column), its turns by seconds of forward per byte that recompute spares; late
    ones first among equals, as the first micro-batch of the last is rebuilt while the rank waits.
    """
    turns = len(stages)
    alone = np.eye(turns, dtype=np.bool_)[:, :, None]
    rows = [np.zeros((turns, 1), dtype=np.bool_), *alone]
    flags = np.stack([_of_stages(instance, stages, row & (stages >= 0)) for row in rows])
    units = units_of(flags)
    spared = units[0] - units[1:]
    seconds = _seconds(instance, boundaries, stages)
    costs = np.where(spared > 0, seconds / np.maximum(spared, 1), np.inf)
    late_first = np.argsort(costs[::-1], axis=0, kind="stable")
    order: NDArray[np.int64] = turns - 1 - late_first
    return order
