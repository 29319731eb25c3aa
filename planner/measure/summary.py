"""From a layer's run, kernel by kernel, to the figures that tell it in short.

This module knows counts. It does not know models or runs.
"""

from collections.abc import Iterable
from dataclasses import replace

from planner.profile import LayerProfile, Moment, OperatorCount

__all__ = ["merged_counts", "rising_moments", "summary"]


def merged_counts(kernels: Iterable[OperatorCount]) -> tuple[OperatorCount, ...]:
    """Equal kernels together, in order of first appearance."""
    numbers: dict[OperatorCount, int] = {}
    for kernel in kernels:
        numbers[kernel] = numbers.get(kernel, 0) + 1
    return tuple(replace(kernel, num_kernels=number) for kernel, number in numbers.items())


def rising_moments(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Those that can be a peak: later ones hold no more, so they count where they are higher."""
    found: list[Moment] = []
    for moment in moments:
        if found and moment.peak_bytes > found[-1].peak_bytes and moment.held == found[-1].held:
            found[-1] = moment
        elif not found or moment.peak_bytes > found[-1].peak_bytes:
            found.append(moment)
    return tuple(found)


def summary(layer: LayerProfile) -> LayerProfile:
    """A layer whose kernels and moments are one by one, with equal kernels and peaks together."""
    assert layer.memory is not None
    inner = layer.memory.inner_backward
    memory = replace(
        layer.memory,
        forward=rising_moments(layer.memory.forward),
        unsaved=rising_moments(layer.memory.unsaved),
        backward=rising_moments(layer.memory.backward),
        inner_backward=None if inner is None else rising_moments(inner),
    )
    return replace(
        layer,
        forward=merged_counts(layer.forward),
        backward=merged_counts(layer.backward),
        forward_transient_bytes=_peak_bytes(memory.forward),
        backward_transient_bytes=_peak_bytes(memory.backward),
        memory=memory,
    )


def _peak_bytes(moments: tuple[Moment, ...]) -> int:
    return moments[-1].peak_bytes if moments else 0
