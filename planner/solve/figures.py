"""Layers of a model at one micro-batch size, as plain arrays of seconds and bytes.

A *cut* c is the place before layer c: cut 0 is the start of the model. Whatever depends on a
stage only through its first layer and its end becomes a figure of a layer or of a cut, so that
a stage's cost is a difference of prefix sums plus a term of each of its two cuts.
This module knows layers. It does not know stages, ranks or links.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cluster.types import Device
from planner.cost import layer_seconds
from planner.graph import LayerGraph, ParameterSpec
from planner.profile import Profile

__all__ = [
    "Figures", "LayerTimes", "ParameterFigures", "Passage", "Saving", "layer_times", "make_figures"
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFigures:
    """Parameters of each layer."""

    weight_bytes: tuple[int, ...]
    """Of what layers compute with."""
    shard_bytes: tuple[int, ...]
    """Of what is kept and updated: the same, but for the masters of mixed precision."""
    master_bytes: tuple[int, ...]
    """Of those masters alone: they stand beside weights in place."""
    updated_bytes: tuple[int, ...]
    """Of what layers compute with, of the parameters that are updated."""
    trainable_bytes: tuple[int, ...]
    """Of the parameters that have a gradient and an optimizer state."""
    tied_weight_bytes: tuple[int, ...]
    """Of the parameters that other layers use as well."""
    tied_trainable_bytes: tuple[int, ...]
    largest_bytes: tuple[int, ...]
    """The largest trainable parameter of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A tensor on its way from one layer that has it to the next one that reads it."""

    maker: int
    """The layer that makes the tensor."""
    holder: int
    """The last layer before `reader` that makes or reads it."""
    reader: int
    num_bytes: int
    requires_grad: bool
    """Whether its gradient returns."""
    first_saver: int | None
    """The first layer that keeps the tensor for backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A tensor that layers keep for backward."""

    maker: int
    savers: tuple[int, ...]
    """Ascending."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one micro-batch, and of a message, on the slowest of some devices."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    again: tuple[float, ...]
    """The forward of a recompute."""
    message: float
    """Compute time that each end of a transfer between ranks loses."""
    issue: float
    """Host time to issue an instruction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Per layer, for one micro-batch."""

    num_layers: int
    parameters: ParameterFigures
    """A tied parameter counts in each layer that uses it: on separate ranks it is held twice."""
    parameters_once: ParameterFigures
    """A tied parameter counts in the first layer that uses it: true on one pipeline rank."""
    tied_bytes: int
    """Of trainable parameters used by several layers."""
    tied_part_bytes: int
    """Of a gradient of them that is not summed yet."""
    saved_bytes: tuple[int, ...]
    """Kept from forward for backward: the layer's own, and its outputs that any layer keeps."""
    savings: tuple[Saving, ...]
    passages: tuple[Passage, ...]
    """What passes between layers, from reader to reader."""
    forward_transient_bytes: tuple[int, ...]
    """Peak of a layer's forward, above what it finds; what it keeps is part of it."""
    own_saved_bytes: tuple[int, ...]
    """What each layer keeps beside boundary tensors."""
    backward_transient_bytes: tuple[int, ...]
    """Peak of a layer's backward above what it has kept."""
    changed_buffer_bytes: tuple[int, ...]
    """Of module buffers that a forward changes, which recompute must find as they were."""
    module_buffer_bytes: int
    batch_bytes: int
    """Batch keys read by several layers (masks), which any rank may load."""
    layer_batch_bytes: tuple[int, ...]
    """Batch keys that this layer alone reads, and the loss's keys in the last layer."""


def layer_times(profile: Profile, devices: Sequence[Device]) -> LayerTimes:
    """What each layer takes on the slowest of the given kinds of device."""
    seconds = [
        max((layer_seconds(layer, device) for device in devices), key=sum)
        for layer in profile.layers
    ]
    return LayerTimes(
        forward=tuple(forward for forward, _ in seconds),
        backward=tuple(backward for _, backward in seconds),
        again=tuple(
            forward if layer.recompute_seconds is None else layer.recompute_seconds
            for layer, (forward, _) in zip(profile.layers, seconds, strict=True)
        ),
        message=max(device.message_seconds for device in devices),
        issue=max(device.instruction_overhead_seconds for device in devices),
    )


def make_figures(graph: LayerGraph, profile: Profile) -> Figures:
    """The figures of a model."""
    shared_batch_bytes, layer_batch_bytes = _batch_bytes(graph)
    savings = _savings(graph, profile)
    saved = [layer.saved_bytes for layer in profile.layers]
    for saving in savings:
        saved[saving.maker] += saving.num_bytes
    return Figures(
        num_layers=len(graph.layers),
        parameters=_parameter_figures(graph, [layer.parameters for layer in graph.layers]),
        parameters_once=_parameter_figures(graph, _first_uses(graph)),
        tied_bytes=sum(parameter.num_bytes for parameter in _tied(graph)),
        tied_part_bytes=sum(parameter.compute_bytes for parameter in _tied(graph)),
        saved_bytes=tuple(saved),
        savings=savings,
        passages=_passages(graph, profile),
        forward_transient_bytes=tuple(layer.forward_transient_bytes for layer in profile.layers),
        own_saved_bytes=tuple(layer.saved_bytes for layer in profile.layers),
        backward_transient_bytes=tuple(layer.backward_transient_bytes for layer in profile.layers),
        changed_buffer_bytes=tuple(
            layer.memory.changed_buffer_bytes if layer.memory else 0 for layer in profile.layers
        ),
        module_buffer_bytes=graph.buffer_bytes,
        batch_bytes=shared_batch_bytes,
        layer_batch_bytes=layer_batch_bytes,
    )


def _tied(graph: LayerGraph) -> list[ParameterSpec]:
    """Trained parameters that several layers use."""
    found = (graph.parameter_specs[name] for name in graph.tied_parameters)
    return [parameter for parameter in found if parameter.trainable]


def _first_uses(graph: LayerGraph) -> list[tuple[str, ...]]:
    seen: set[str] = set()
    uses = []
    for layer in graph.layers:
        uses.append(tuple(name for name in layer.parameters if name not in seen))
        seen.update(layer.parameters)
    return uses


def _parameter_figures(graph: LayerGraph, uses: Sequence[tuple[str, ...]]) -> ParameterFigures:
    specs = graph.parameter_specs
    layers = [[specs[name] for name in names] for names in uses]
    trainable: list[list[ParameterSpec]] = [[p for p in layer if p.trainable] for layer in layers]
    tied = set(graph.tied_parameters)

    def total(layer: Sequence[ParameterSpec], *, tied_only: bool = False) -> int:
        return sum(p.num_bytes for p in layer if not tied_only or p.name in tied)

    def compute(layer: Sequence[ParameterSpec], *, tied_only: bool = False) -> int:
        return sum(p.compute_bytes for p in layer if not tied_only or p.name in tied)

    return ParameterFigures(
        weight_bytes=tuple(map(compute, layers)),
        shard_bytes=tuple(map(total, layers)),
        master_bytes=tuple(total([p for p in layer if p.compute_dtype]) for layer in layers),
        updated_bytes=tuple(map(compute, trainable)),
        trainable_bytes=tuple(map(total, trainable)),
        tied_weight_bytes=tuple(compute(layer, tied_only=True) for layer in layers),
        tied_trainable_bytes=tuple(total(layer, tied_only=True) for layer in trainable),
        largest_bytes=tuple(max((p.num_bytes for p in layer), default=0) for layer in trainable),
    )


def _savers(graph: LayerGraph, profile: Profile) -> dict[str, list[int]]:
    """Boundary tensor -> the layers that keep it, ascending."""
    savers: dict[str, list[int]] = {tensor.name: [] for tensor in graph.tensors}
    for index, layer in enumerate(profile.layers):
        for name in layer.saved_tensors:
            if name in savers:
                savers[name].append(index)
    return savers


def _savings(graph: LayerGraph, profile: Profile) -> tuple[Saving, ...]:
    """A tensor kept by several layers of a stage is one storage, counted in the layer that makes
    it; a stage that begins after its maker counts it at its entry; a stage that ends right after
    its maker, and keeps nothing of it, takes it off again at its exit."""
    specs, makers = graph.tensor_specs, graph.makers
    return tuple(
        Saving(maker=makers[name], savers=tuple(layers), num_bytes=specs[name].num_bytes)
        for name, layers in _savers(graph, profile).items()
        if layers
    )


def _passages(graph: LayerGraph, profile: Profile) -> tuple[Passage, ...]:
    specs, makers, savers = graph.tensor_specs, graph.makers, _savers(graph, profile)
    return tuple(
        Passage(
            maker=makers[name],
            holder=holder,
            reader=reader,
            num_bytes=specs[name].num_bytes,
            requires_grad=specs[name].requires_grad,
            first_saver=savers[name][0] if savers[name] else None,
        )
        for name, readers in graph.readers.items()
        for holder, reader in itertools.pairwise((makers[name], *sorted(readers)))
    )


def _batch_bytes(graph: LayerGraph) -> tuple[int, tuple[int, ...]]:
    """Bytes of batch keys read by several layers, and of those that each layer alone reads."""
    users: dict[str, list[int]] = {tensor.name: [] for tensor in graph.batch}
    for index in range(len(graph.layers)):
        for key in graph.stage_code(index, index).batch_keys:
            users[key].append(index)
    shared, alone = 0, [0] * len(graph.layers)
    for tensor in graph.batch:
        if len(users[tensor.name]) == 1:
            alone[users[tensor.name][0]] += tensor.num_bytes
        elif users[tensor.name]:
            shared += tensor.num_bytes
    return shared, tuple(alone)
