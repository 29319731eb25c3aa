"""What the fullest pipeline rank takes at least, where most layers are alike.

Layers are whole: where so many alike ones are dealt out, the rank that gets most of them, or the
one that has the heavy last layer as well, is behind the mean of all. And memory is each rank's own:
what one has too little of, no other makes up for. With stage s on rank s mod P, the first rank has
the first layer and the last rank the last, wherever the cuts lie; so each rank's least time follows
from how many of the alike layers it holds, and a step takes as long as the best way to deal them
out. This module knows layers and ranks. It does not know splits.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.solve.floor_memory import (
    Surroundings,
    gathers,
    pool_bytes,
    several_pool_bytes,
    state_bytes,
)
from planner.solve.rates import Floats, LayerFloors
from planner.solve.space import Batching, Options

__all__ = ["Waits", "fullest_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What a step takes beside the compute of a rank, in seconds."""

    start: float
    """Before the first forward of the step."""
    last: float
    """After the last backward of the step."""
    before: Floats
    """Per rank: what it waits for at both ends of the step."""
    between: Floats
    """Per rank: what it waits for between its forwards and its backwards."""


@dataclass(frozen=True, kw_only=True)
class _Deal:
    """Who may hold what: of each rank (a row) with so many alike layers (a column, from none).

    The layers that are neither alike nor at an end are left out.
    """

    alike: np.ndarray
    num_ranks: int

    @cached_property
    def numbers(self) -> Floats:
        return np.arange(int(self.alike.sum()) + 1, dtype=np.float64)

    def sums(self, figures: Floats) -> Floats:
        """At least what a rank's layers add up to."""
        found: Floats = np.tile(
            self.numbers * float(figures[self.alike].min()), (self.num_ranks, 1)
        )
        found[0] += figures[0]
        found[-1] += figures[-1]
        return found

    def largest(self, figures: Floats) -> Floats:
        """At least the largest of a rank's layers."""
        found: Floats = np.zeros((self.num_ranks, len(self.numbers)))
        found[:, 1:] = float(figures[self.alike].min())
        found[0] = np.maximum(found[0], figures[0])
        found[-1] = np.maximum(found[-1], figures[-1])
        return found


def fullest_seconds(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    waits: Waits,
    num_buffers: int,
) -> float:
    """A step time that no placement with stage s on rank s mod P undercuts; infinite where none
    fits.

    `num_buffers` is 1, or 2 for two and more; 0 where it is open.
    """
    count, number = batching.num_micro_batches, int(floors.alike.sum())
    if not number:
        return 0.0
    deal = _Deal(alike=floors.alike, num_ranks=batching.num_pipeline_ranks)
    compute = deal.sums(count * floors.both)
    rebuilt = _rebuilt(batching, floors, around, options, deal, num_buffers)
    # While it waits between, a rank may rebuild the first micro-batch of its own last stage.
    rest = rebuilt * ((count - 1) / count) if count > 1 else np.where(np.isinf(rebuilt), rebuilt, 0)
    shown = compute + np.maximum(rebuilt, rest + waits.between[:, None])
    shown += waits.start + waits.before[:, None]
    shards = around.num_parts if options.partition else 1
    per_byte = around.update_seconds / shards * around.updates_compute
    updates = deal.sums(around.trainable_bytes * per_byte)
    # Its updates may fill the wait at its end.
    backs = np.concatenate([[0.0], np.cumsum(floors.backward)])[: deal.num_ranks, None]
    times = shown + np.maximum(waits.last, updates - backs)
    if num_buffers == 1 and gathers(options):
        # No weights come while the stage before is computed.
        each = around.byte_seconds if options.partition == 3 else around.load_byte_seconds
        coming = deal.sums((around.weight_bytes - around.tied_bytes) * each)
        times = np.maximum(times, compute + rebuilt + coming)
    # All alike layers have a place where so many pairs of a rank and a number are within the time.
    placed = np.partition(times[:, 1:], number - 1, axis=None)[number - 1]
    return float(max(placed, times[:, 0].max()))


def _rebuilt(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    deal: _Deal,
    num_buffers: int,
) -> Floats:
    """Seconds of forwards that its memory forces each rank to run again; infinite where even
    recompute does not help."""
    count, alike = batching.num_micro_batches, deal.alike
    pooled = deal.largest(pool_bytes(around, options))
    if num_buffers > 1:
        alone, each = several_pool_bytes(around, options)
        # A rank with one stage alone has one buffer for all of its layers.
        pooled = np.maximum(pooled, np.minimum(deal.largest(each), deal.sums(alone)))
    room = float(around.limit_bytes.max()) - pooled
    room -= deal.sums(state_bytes(around, options))
    # The last layer has its first micro-batch there when its backward begins, rebuilt or not.
    room[-1] -= float(floors.ending[0]) + float(floors.saved[-1])
    never = room < 0
    if around.recompute:
        return np.where(never, np.inf, deal.sums(count * floors.again))
    kept = count * (floors.saved + (0.0 if options.offload_inputs else floors.named))
    size = float(kept[alike].min())
    missing = deal.numbers * size - room
    whole = missing.copy()
    whole[-1] += float(kept[-1]) - float(floors.saved[-1])
    if around.recompute is False:
        return np.where(never | (whole > 0), np.inf, 0.0)

    def fewest(missing: Floats) -> Floats:
        """Seconds of the alike layers to run again, of those that there are."""
        needed = np.where(missing > 0, np.ceil(missing / size - 1e-9) if size else np.inf, 0.0)
        cost = count * float(floors.again[alike].min())
        return np.where(never | (needed > deal.numbers), np.inf, needed * cost)

    # The last layer is run again or not; what the first one keeps is left out.
    again = fewest(missing)
    again[-1] += count * float(floors.again[-1])
    return np.minimum(again, fewest(whole))
