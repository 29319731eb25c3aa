"""Layers and cuts of a model at one micro-batch size, as plain arrays of seconds and bytes.

A *cut* c is the place before layer c: cut 0 is the start of the model. Whatever depends on a
stage only through its first layer and its end becomes a figure of a layer or of a cut, so that
a stage's cost is a difference of prefix sums plus a term of each of its two cuts.
This module knows layers and cuts. It does not know stages, ranks or links.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cluster.types import Device
from planner.cost import layer_seconds
from planner.graph import LayerGraph, ParameterSpec
from planner.profile import Profile

__all__ = ["Figures", "ParameterFigures", "Passage", "make_figures"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFigures:
    """Parameters of each layer."""

    weight_bytes: tuple[int, ...]
    trainable_bytes: tuple[int, ...]
    """Of the parameters that have a gradient and an optimizer state."""
    trainable_words: tuple[int, ...]
    """The same in words of 4 bytes, rounded up: float32 elements, or what takes as much."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Per layer (length L) or per cut (length L + 1), for one micro-batch."""

    num_layers: int
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    parameters: ParameterFigures
    """A tied parameter counts in each layer that uses it: on separate ranks it is held twice."""
    parameters_once: ParameterFigures
    """A tied parameter counts in the first layer that uses it: true on one pipeline rank."""
    tied_bytes: int
    """Of trainable parameters used by several layers."""
    saved_bytes: tuple[int, ...]
    """Kept from forward for backward: the layer's own, and its outputs that any layer keeps."""
    entry_saved_bytes: tuple[int, ...]
    """Per cut: tensors from before it that a layer after it keeps for backward."""
    exit_unsaved_bytes: tuple[int, ...]
    """Per cut: outputs of the layer before it that only layers after it keep."""
    crossing_bytes: tuple[int, ...]
    """Per cut: tensors from before it that layers after it read."""
    gradient_crossing_bytes: tuple[int, ...]
    """Per cut: those of them whose gradient returns."""
    passages: tuple[Passage, ...]
    """What passes between layers, from reader to reader."""
    message_seconds: float
    """Compute time that each end of a transfer between ranks loses."""
    transient_bytes: tuple[int, ...]
    """Per layer: peak above what is kept."""
    batch_bytes: int
    """Batch keys read by several layers (masks), which any rank may load."""
    layer_batch_bytes: tuple[int, ...]
    """Batch keys that this layer alone reads, and the loss's keys in the last layer."""


def make_figures(graph: LayerGraph, profile: Profile, devices: Sequence[Device]) -> Figures:
    """The figures of a model on the slowest of the given kinds of device."""
    seconds = [
        max((layer_seconds(layer, device) for device in devices), key=sum)
        for layer in profile.layers
    ]
    shared_batch_bytes, layer_batch_bytes = _batch_bytes(graph)
    saved, entry_saved, exit_unsaved = _saved_bytes(graph, profile)
    crossing, gradient_crossing = _crossing_bytes(graph)
    return Figures(
        num_layers=len(graph.layers),
        forward_seconds=tuple(forward for forward, _ in seconds),
        backward_seconds=tuple(backward for _, backward in seconds),
        parameters=_parameter_figures(graph, [layer.parameters for layer in graph.layers]),
        parameters_once=_parameter_figures(graph, _first_uses(graph)),
        tied_bytes=sum(
            graph.parameter_specs[name].num_bytes
            for name in graph.tied_parameters
            if graph.parameter_specs[name].trainable
        ),
        saved_bytes=saved,
        entry_saved_bytes=entry_saved,
        exit_unsaved_bytes=exit_unsaved,
        crossing_bytes=crossing,
        gradient_crossing_bytes=gradient_crossing,
        passages=_passages(graph),
        message_seconds=max(device.message_seconds for device in devices),
        transient_bytes=tuple(
            max(
                layer.backward_transient_bytes,
                layer.forward_transient_bytes - layer.saved_bytes,
            )
            for layer in profile.layers
        ),
        batch_bytes=shared_batch_bytes,
        layer_batch_bytes=layer_batch_bytes,
    )


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
    return ParameterFigures(
        weight_bytes=tuple(sum(p.num_bytes for p in layer) for layer in layers),
        trainable_bytes=tuple(sum(p.num_bytes for p in layer) for layer in trainable),
        trainable_words=tuple(-(-sum(p.num_bytes for p in layer) // 4) for layer in trainable),
    )


def _saved_bytes(
    graph: LayerGraph, profile: Profile
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Saved bytes per layer, and the corrections at a stage's first and last cut.

    A tensor kept by several layers of a stage is one storage. It counts in the layer that makes
    it; a stage that begins after its maker counts it at its entry; a stage that ends right after
    its maker, and keeps nothing of it, takes it off again at its exit. A tensor with distant
    readers may be counted where it is not kept, never the reverse.
    """
    num_layers = len(graph.layers)
    savers: dict[str, list[int]] = {tensor.name: [] for tensor in graph.tensors}
    for index, layer in enumerate(profile.layers):
        for name in layer.saved_tensors:
            if name in savers:
                savers[name].append(index)
    saved = [layer.saved_bytes for layer in profile.layers]
    entry, exit_unsaved = [0] * (num_layers + 1), [0] * (num_layers + 1)
    specs, makers = graph.tensor_specs, graph.makers
    for name, layers in savers.items():
        if not layers:
            continue
        maker, num_bytes = makers[name], specs[name].num_bytes
        saved[maker] += num_bytes
        for cut in range(maker + 1, max(layers) + 1):
            entry[cut] += num_bytes
        if min(layers) > maker:
            exit_unsaved[maker + 1] += num_bytes
    return tuple(saved), tuple(entry), tuple(exit_unsaved)


def _crossing_bytes(graph: LayerGraph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    num_cuts = len(graph.layers) + 1
    crossing, gradients = [0] * num_cuts, [0] * num_cuts
    specs, makers = graph.tensor_specs, graph.makers
    for name, readers in graph.readers.items():
        for cut in range(makers[name] + 1, max(readers, default=-1) + 1):
            crossing[cut] += specs[name].num_bytes
            gradients[cut] += specs[name].num_bytes if specs[name].requires_grad else 0
    return tuple(crossing), tuple(gradients)


def _passages(graph: LayerGraph) -> tuple[Passage, ...]:
    specs, makers = graph.tensor_specs, graph.makers
    return tuple(
        Passage(
            maker=makers[name],
            holder=holder,
            reader=reader,
            num_bytes=specs[name].num_bytes,
            requires_grad=specs[name].requires_grad,
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
