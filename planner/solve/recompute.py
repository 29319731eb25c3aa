"""Which stages run forward again, for given boundaries: as little as memory allows.

A rank's memory does not depend on the other ranks' recompute, so all ranks are decided together:
each takes its cheapest stages, as many as it needs. This module knows the Instance alone.
"""

import numpy as np
from numpy.typing import NDArray

from planner.solve.instance import Instance, rank_units, rank_units_of_many
from planner.solve.types import Split

__all__ = ["choose_recompute"]

Flags = NDArray[np.bool_]


def choose_recompute(instance: Instance, boundaries: tuple[int, ...]) -> Split:
    """The boundaries with recompute where memory asks for it; it may not fit even so."""
    split = instance.choice.split(boundaries)
    over = zip(rank_units(instance, split), instance.limit_units, strict=True)
    if instance.choice.recompute is not None or all(used <= limit for used, limit in over):
        return split
    turns, ranks = instance.choice.stages_per_rank, instance.choice.num_pipeline_ranks
    order = _cheapest_first(instance, boundaries)
    # Row n: the n cheapest stages of every rank.
    places = np.argsort(order, axis=0)
    flags = (places.reshape(-1) < np.arange(turns + 1)[:, None]).astype(np.bool_)
    fits = _units(instance, boundaries, flags) <= np.array(instance.limit_units)
    numbers = np.where(fits.any(axis=0), fits.argmax(axis=0), turns)
    chosen = places < numbers[None, :]
    # What a later, larger stage spares may have made an earlier one's recompute needless.
    without = np.repeat(chosen.reshape(1, -1), turns, axis=0)
    for turn in range(turns):
        without[turn, turn * ranks : (turn + 1) * ranks] = False
    fits = _units(instance, boundaries, without) <= np.array(instance.limit_units)
    forward = np.diff(np.array(instance.forward)[list(boundaries)]).reshape(turns, ranks)
    spared = np.where(fits & chosen, forward, -1).argmax(axis=0)
    needless = (fits & chosen)[spared, np.arange(ranks)]
    chosen[spared, np.arange(ranks)] &= ~needless
    return Split(boundaries=boundaries, recompute=tuple(chosen.reshape(-1).tolist()))


def _units(instance: Instance, boundaries: tuple[int, ...], flags: Flags) -> NDArray[np.int64]:
    """Memory of each rank, for each row of flags."""
    cuts = np.repeat(np.array([boundaries]), len(flags), axis=0)
    return rank_units_of_many(instance, cuts, flags)


def _cheapest_first(instance: Instance, boundaries: tuple[int, ...]) -> NDArray[np.int64]:
    """Per rank (a column), its stages by seconds of forward per byte that recompute spares; late
    ones first among equals, as the first micro-batch of the last is rebuilt while the rank waits.
    """
    turns, ranks = instance.choice.stages_per_rank, instance.choice.num_pipeline_ranks
    flags = np.zeros((turns + 1, turns * ranks), dtype=np.bool_)
    for turn in range(turns):
        flags[turn + 1, turn * ranks : (turn + 1) * ranks] = True
    units = _units(instance, boundaries, flags)
    spared = units[0] - units[1:]
    forward = np.diff(np.array(instance.forward)[list(boundaries)]).reshape(turns, ranks)
    costs = np.where(spared > 0, forward / np.maximum(spared, 1), np.inf)
    late_first = np.argsort(costs[::-1], axis=0, kind="stable")
    order: NDArray[np.int64] = turns - 1 - late_first
    return order
