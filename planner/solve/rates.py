"""What the layers of a model take at any micro-batch size: at least.

Exact where the size has been profiled. Elsewhere bounds from the sizes that have: what a kernel
takes grows with the size, in a straight line or, by the roofline, in a line that bends upwards; so
beyond two profiled sizes the line through them lies below it, and between two the larger one's
share of a sample does. The figures are those of the fastest kind of device for each layer.
This module knows layers and sizes. It does not know meshes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.cluster.types import Device
from planner.cost import layer_seconds
from planner.graph import LayerGraph
from planner.profile import LayerProfile
from planner.solve.problem import Problem

__all__ = ["Floats", "LayerFloors", "Rates"]

Floats = NDArray[np.float64]
ALIKE = 1e-6
"""Layers that differ by less than this part are dealt out as one kind."""


@dataclass(frozen=True, kw_only=True)
class LayerFloors:
    """Per layer: what one micro-batch takes at least."""

    forward: Floats
    """Seconds."""
    backward: Floats
    again: Floats
    """A second forward, before backward."""
    saved: Floats
    """Bytes kept for backward that stand on the layer's rank, whatever its stage."""
    named: Floats
    """Bytes of its outputs that backward keeps: they may be offloaded with the stage's inputs."""
    ending: Floats
    """Bytes that the backward of the last layer, the only entry, takes above what is saved."""
    is_exact: bool

    @cached_property
    def both(self) -> Floats:
        return self.forward + self.backward

    @cached_property
    def prefix(self) -> Floats:
        """Seconds of the layers before each cut, both directions."""
        return np.concatenate([[0.0], np.cumsum(self.both)])

    @cached_property
    def alike(self) -> NDArray[np.bool_]:
        """Layers that take as long as each other: of those between the first and the last, the
        kind that takes most of the time."""
        inner = self.both[1:-1]
        found = np.zeros(len(self.both), dtype=np.bool_)
        if len(inner):
            same = np.isclose(inner[:, None], inner[None, :], rtol=ALIKE, atol=0.0)
            kind = (same.sum(axis=1) * inner).argmax()
            found[1:-1] = same[kind]
        return found

    @cached_property
    def falling(self) -> Floats:
        """Seconds of each layer in both directions, longest first."""
        return np.sort(self.both)[::-1]


@dataclass(kw_only=True)
class Rates:
    """Floors of every size, from the sizes profiled so far."""

    problem: Problem
    known: dict[int, LayerFloors] = field(default_factory=dict)

    @cached_property
    def devices(self) -> Sequence[Device]:
        """The kinds of device that may be used."""
        kinds, left = dict[int, Device](), self.problem.num_devices
        for host in self.problem.cluster.hosts:
            if left > 0:
                kinds.setdefault(id(host.device), host.device)
            left -= host.num_devices
        return list(kinds.values())

    @cached_property
    def updaters(self) -> Sequence[Device]:
        """What may update the state: those devices, or their hosts."""
        if not self.problem.updates_on_host:
            return self.devices
        return [host.updater for host in self.problem.cluster.hosts]

    def learn(self, size: int) -> None:
        """Take the figures of a size from its profile."""
        if size in self.known:
            return
        graph, profile = self.problem.graph_at(size), self.problem.profile_at(size)
        seconds = np.array(
            [[layer_seconds(layer, device) for layer in profile.layers] for device in self.devices]
        )
        forward, backward = seconds[:, :, 0].min(axis=0), seconds[:, :, 1].min(axis=0)
        again = [layer.recompute_seconds for layer in profile.layers]
        self.known[size] = LayerFloors(
            forward=forward,
            backward=backward,
            again=np.array([f if a is None else a for f, a in zip(forward, again, strict=True)]),
            saved=np.array([_own_saved_bytes(layer) for layer in profile.layers], dtype=float),
            named=_named_saved_bytes(graph, profile.layers),
            ending=np.array([profile.layers[-1].backward_transient_bytes], dtype=float),
            is_exact=True,
        )

    def at(self, size: int) -> LayerFloors:
        """The floors of a size, exact or from the nearest sizes that are known."""
        if size in self.known:
            return self.known[size]
        smaller = sorted(known for known in self.known if known < size)
        larger = sorted(known for known in self.known if known > size)
        found = {
            name: self._at_least(name, size, smaller, larger)
            for name in ("forward", "backward", "again", "saved", "named", "ending")
        }
        return LayerFloors(**found, is_exact=False)

    def _at_least(
        self, name: str, size: int, smaller: Sequence[int], larger: Sequence[int]
    ) -> Floats:
        def known(one: int) -> Floats:
            found: Floats = getattr(self.known[one], name)
            return found

        least = np.zeros_like(known(next(iter(self.known))))
        if smaller:
            least = np.maximum(least, known(smaller[-1]))
        if len(smaller) > 1:
            two, one = smaller[-1], smaller[-2]
            slope = (known(two) - known(one)) / (two - one)
            least = np.maximum(least, known(two) + (size - two) * slope)
        if larger:
            least = np.maximum(least, known(larger[0]) * (size / larger[0]))
        return least


def _own_saved_bytes(layer: LayerProfile) -> int:
    """Without what a stage keeps once for all of its layers."""
    shared = sum(size for _, size in layer.memory.saved_prologue) if layer.memory else 0
    return layer.saved_bytes - shared


def _named_saved_bytes(graph: LayerGraph, layers: Sequence[LayerProfile]) -> Floats:
    """Boundary tensors that backward keeps, each counted at its maker, views left out."""
    found = np.zeros(len(layers))
    specs, makers = graph.tensor_specs, graph.makers
    kept = {name for layer in layers for name in layer.saved_tensors if name in makers}
    for name in kept:
        maker = makers[name]
        memory, outputs = layers[maker].memory, graph.layers[maker].outputs
        if memory is None or memory.output_storages[outputs.index(name)][0] == name:
            found[maker] += specs[name].num_bytes
    return found
