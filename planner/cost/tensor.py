"""Tensor parallelism: what one of T ranks of a host sees of a layer, and the all-reduces it adds.

The profile says which kernels, parameters and memory T divides (`planner.measure.with_splits`).
This module divides. It does not know what can be split, nor where the T devices are.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from planner.cluster.types import CollectiveAlgorithm, Device, Link
from planner.cost.collectives import all_reduce_seconds
from planner.cost.seconds import kernels_seconds
from planner.errors import UsageError
from planner.profile import LayerMemory, LayerProfile, Moment, OperatorCount, Profile

__all__ = ["split_layer", "split_layer_seconds", "split_profile", "tensor_seconds"]


def split_profile(profile: Profile, degree: int) -> Profile:
    """The profile as one of `degree` tensor-parallel ranks sees it; itself at degree 1.

    Kernels' flop and bytes, parameters, saved bytes and transient peaks are divided where they are
    split, rounded up: a vocabulary that the degree does not divide is padded. Times that were
    measured stay as they are, of the whole layer: see `split_layer_seconds`.

    Raises:
        UsageError: the degree is below 1, the profile was made without splits, or a layer works on
            pieces (heads) whose number the degree does not divide.
    """
    if degree < 1:
        raise UsageError(f"the tensor degree is {degree}", hint="give a degree of at least 1")
    if degree == 1:
        return profile
    known: dict[int, LayerProfile] = {}
    return replace(profile, layers=tuple(split_layer(x, degree, known) for x in profile.layers))


def split_layer(
    layer: LayerProfile, degree: int, known: dict[int, LayerProfile] | None = None
) -> LayerProfile:
    """One layer of `split_profile`. `known` remembers those done, by identity."""
    if known is not None and id(layer) in known:
        return known[id(layer)]
    found = layer if degree == 1 else _split_layer(layer, degree)
    if known is not None:
        known[id(layer)] = found
    return found


def tensor_seconds(
    layer: LayerProfile, degree: int, link: Link, algorithm: CollectiveAlgorithm = "ring"
) -> tuple[float, float]:
    """Seconds of the all-reduces that forward and backward of one micro-batch add.

    Each is an all-reduce over `degree` devices on an idle link (`all_reduce_seconds`); nothing
    hides it, as the next operator needs its result. 0 at degree 1.
    """
    if degree == 1:
        return 0.0, 0.0
    forward, backward = (
        math.fsum(all_reduce_seconds(num_bytes, degree, link, algorithm) for num_bytes in sizes)
        for sizes in (layer.forward_all_reduce_bytes, layer.backward_all_reduce_bytes)
    )
    return forward, backward


def split_layer_seconds(
    layer: LayerProfile,
    degree: int,
    device: Device,
    link: Link,
    algorithm: CollectiveAlgorithm = "ring",
) -> tuple[float, float]:
    """Forward and backward seconds of one micro-batch on each of `degree` ranks, all-reduces
    included.

    `layer` is the whole layer. Kernels take what `kernels_seconds` says of the divided counts;
    where the whole layer was measured, that measurement scaled as the kernels' time scales.
    """
    divided = split_layer(layer, degree)
    seconds = []
    for whole, part, measured, waiting in zip(
        (layer.forward, layer.backward),
        (divided.forward, divided.backward),
        (layer.forward_seconds, layer.backward_seconds),
        tensor_seconds(layer, degree, link, algorithm),
        strict=True,
    ):
        if measured is None:
            seconds.append(kernels_seconds(part, device, collective_seconds=waiting))
            continue
        modelled = kernels_seconds(whole, device)
        scale = kernels_seconds(part, device) / modelled if modelled and degree > 1 else 1.0
        seconds.append(measured * scale + waiting)
    return seconds[0], seconds[1]


def _split_layer(layer: LayerProfile, degree: int) -> LayerProfile:
    split = layer.split
    if split is None:
        raise UsageError(
            f"the profile of layer {layer.name!r} does not say what tensor parallelism of degree "
            f"{degree} would divide",
            hint="make the profile with planner.measure.with_splits, or use degree 1",
        )
    if split.pieces % degree:
        raise UsageError(
            f"tensor degree {degree} does not divide the {split.pieces} pieces (heads, or groups "
            f"of them) that layer {layer.name!r} works on",
            hint=f"use one of the degrees {', '.join(map(str, _divisors(split.pieces)))}",
        )
    saved = math.ceil(layer.saved_bytes * (1 - split.saved_share * (1 - 1 / degree)))
    forward_peak = _peak(layer.forward_transient_bytes, split.forward_peaks, degree)
    backward_peak = _peak(layer.backward_transient_bytes, split.backward_peaks, degree)
    return replace(
        layer,
        forward=tuple(_divided(layer.forward, degree)),
        backward=tuple(_divided(layer.backward, degree)),
        parameter_bytes=layer.parameter_bytes
        - split.parameter_bytes
        + -(-split.parameter_bytes // degree),
        saved_bytes=min(layer.saved_bytes, saved),
        forward_transient_bytes=forward_peak,
        backward_transient_bytes=backward_peak,
        memory=None
        if layer.memory is None
        else _split_memory(layer.memory, forward_peak, backward_peak),
    )


def _divided(counts: Iterable[OperatorCount], degree: int) -> Iterable[OperatorCount]:
    for count in counts:
        if count.split:
            flop, moved = -(-count.flop // degree), -(-count.moved_bytes // degree)
            yield replace(count, flop=flop, moved_bytes=moved)
        else:
            yield count


def _peak(num_bytes: int, peaks: Iterable[tuple[float, float]], degree: int) -> int:
    """The largest moment of a rank that holds the whole of some tensors and a part of others."""
    share = max((whole + part / degree for whole, part in peaks), default=1.0)
    return min(num_bytes, math.ceil(num_bytes * share))


def _split_memory(memory: LayerMemory, forward_peak: int, backward_peak: int) -> LayerMemory:
    """No moment of a rank exceeds its own peak, nor what the whole layer held then."""

    def bounded(moments: tuple[Moment, ...], peak: int) -> tuple[Moment, ...]:
        return tuple(replace(m, peak_bytes=min(m.peak_bytes, peak)) for m in moments)

    inner = memory.inner_backward
    return replace(
        memory,
        forward=bounded(memory.forward, forward_peak),
        unsaved=bounded(memory.unsaved, forward_peak),
        backward=bounded(memory.backward, backward_peak),
        inner_backward=None if inner is None else bounded(inner, backward_peak),
    )


def _divisors(number: int) -> list[int]:
    return [degree for degree in range(1, number + 1) if number % degree == 0]
