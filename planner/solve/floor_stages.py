"""What no placement with a demanded number of stages can undercut.

One micro-batch goes through all layers and back while all others wait for the longest stage, and a
model that is cut into so many stages has one of a certain length at least, wherever the cuts lie.
This module knows the seconds of layers. It does not know memory, links or options: they only add.
"""

import itertools

import numpy as np

from planner.solve.rates import LayerFloors
from planner.solve.space import Batching
from planner.solve.splits import largest_stage

__all__ = ["staged_seconds"]

TICKS = 2**40
"""Of all layers together: seconds are counted in whole ticks, rounded down."""


def staged_seconds(batching: Batching, floors: LayerFloors, stages_per_rank: int) -> float:
    """Seconds of a step that no split into so many stages undercuts, whatever its options.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    stages, whole = batching.num_pipeline_ranks * stages_per_rank, float(floors.both.sum())
    if stages > len(floors.both):
        raise ValueError(f"{stages} stages of {len(floors.both)} layers")
    if whole <= 0:
        return 0.0
    ticks = np.floor(floors.both / whole * TICKS).astype(np.int64).tolist()
    prefix = tuple(itertools.accumulate(ticks, initial=0))
    longest = largest_stage(prefix, stages) / TICKS * whole
    return whole + (batching.num_micro_batches - 1) * longest
