"""What crosses the cuts of a model, for stages of about a given length.

What a stage receives, keeps or hands on depends on both of its cuts. Here it depends on one: a
tensor counts at a cut where a stage of about the mean length, beginning or ending there, has to do
with it. That is exact where tensors pass from layer to layer, and near it for skip connections.
This module knows layers and cuts. It does not know links, ranks or micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.solve.figures import Figures

__all__ = ["Crossings", "make_crossings"]

LONGEST = 2
"""A stage that memory must serve has at most so many times the mean number of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossings:
    """Bytes per cut, for one micro-batch."""

    inputs: tuple[int, ...]
    """Read by a stage that begins there."""
    gradients: tuple[int, ...]
    """Of those, what has a gradient that returns."""
    outputs: tuple[int, ...]
    """Made by a stage that ends there, and read after it."""
    unsaved_outputs: tuple[int, ...]
    """Of those, what the stage does not keep for its own backward."""
    kept_inputs: tuple[int, ...]
    """Of earlier layers' tensors, what a stage that begins there keeps for backward."""
    kept_elsewhere: tuple[int, ...]
    """Outputs of the layer before that only later layers keep, and so not a stage that ends
    there."""


def make_crossings(figures: Figures, num_stages: int) -> Crossings:
    """For that many stages."""
    num_cuts = figures.num_layers + 1
    reach = LONGEST * math.ceil(figures.num_layers / num_stages)
    inputs, gradients, outputs, unsaved, kept, elsewhere = ([0] * num_cuts for _ in range(6))
    for passage in figures.passages:
        for cut in range(passage.holder + 1, passage.reader + 1):
            if passage.reader - cut < reach:
                inputs[cut] += passage.num_bytes
                gradients[cut] += passage.num_bytes if passage.requires_grad else 0
            if cut - passage.maker <= reach:
                outputs[cut] += passage.num_bytes
                saved = passage.first_saver is not None and passage.first_saver < cut
                unsaved[cut] += 0 if saved else passage.num_bytes
    for saving in figures.savings:
        for cut in range(saving.maker + 1, saving.savers[-1] + 1):
            if _next(saving.savers, cut) - cut < reach:
                kept[cut] += saving.num_bytes
        if saving.savers[0] > saving.maker:
            elsewhere[saving.maker + 1] += saving.num_bytes
    return Crossings(
        inputs=tuple(inputs),
        gradients=tuple(gradients),
        outputs=tuple(outputs),
        unsaved_outputs=tuple(unsaved),
        kept_inputs=tuple(kept),
        kept_elsewhere=tuple(elsewhere),
    )


def _next(layers: Sequence[int], cut: int) -> int:
    """The first of ascending layers at or behind a cut."""
    return next(layer for layer in layers if layer >= cut)
