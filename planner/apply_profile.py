"""A measured profile and a cluster -> profiles that the solver and the lowering take seconds from.

A profile of another model, or of a device that the cluster does not have, is refused. At a
micro-batch size between two measured ones a layer's seconds lie on the line between them; beyond
them it takes what the roofline says, scaled as it has to be scaled at the nearest measured size.
This module knows what fits together. It does not know how anything was measured or is solved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from planner.cluster.library import device_names, device_profile
from planner.cluster.types import Cluster, Device
from planner.cost import layer_seconds, update_seconds
from planner.errors import FingerprintError, UsageError
from planner.graph import LayerGraph
from planner.measure.here import processor_name
from planner.measure.measured import MeasuredDevice, MeasuredLayer, MeasuredModel, MeasuredSize
from planner.profile import LayerProfile, Profile

__all__ = ["AppliedProfile", "apply_profile"]

_MEASURE_AGAIN = "measure it again with lga-profile, or plan without --profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedProfile:
    """A measured profile that belongs to a model and to a cluster."""

    measured: MeasuredModel
    graph_at: Callable[[int], LayerGraph]
    counted_at: Callable[[int], Profile]
    cluster: Cluster
    """Its devices update as fast as was measured."""
    factor: float
    """What a layer takes there over what was measured: processes may share a core."""
    warning: str = ""

    def profile_at(self, micro_batch_size: int) -> Profile:
        """Counts of this size, and seconds from the measured ones.

        Raises:
            UsageError: the profile was measured of other layers than the model has.
            TraceError: the model cannot be traced with this size.
        """
        counted = self.counted_at(micro_batch_size)
        below, above = self._neighbours(micro_batch_size)
        if below is above and below.micro_batch_size == micro_batch_size:
            _check_layers(self.measured, below, self.graph_at(micro_batch_size))
        first, last = _by_name(below), _by_name(above)
        layers = []
        for layer in counted.layers:
            known = first[layer.name], last[layer.name]
            if below is above and below.micro_batch_size != micro_batch_size:
                seconds = self._scaled(layer, known[0])
            else:
                seconds = self._on_line(known, below, above, micro_batch_size)
            layers.append(
                replace(
                    layer,
                    forward_seconds=seconds[0],
                    backward_seconds=seconds[1],
                    recompute_seconds=seconds[2],
                    update_seconds=known[0].update.median * self.factor,
                    provenance=f"{layer.provenance}; seconds {self.note_at(micro_batch_size)}",
                )
            )
        return Profile(micro_batch_size=micro_batch_size, layers=tuple(layers))

    def note_at(self, micro_batch_size: int) -> str:
        """Where the seconds of this size come from: device, date, sizes."""
        below, above = self._neighbours(micro_batch_size)
        device = self.measured.device
        note = f"measured on {device.name}, {self.measured.date}"
        if below is not above:
            note += (
                f", interpolated between micro-batches of {below.micro_batch_size} and "
                f"{above.micro_batch_size}"
            )
        elif below.micro_batch_size != micro_batch_size:
            note += (
                f", at micro-batches of {below.micro_batch_size}; to {micro_batch_size} by the "
                "roofline"
            )
        if self.factor > 1:
            note += f", times {self.factor:.3g}: its {device.num_cores} cores are shared"
        return note

    def _neighbours(self, micro_batch_size: int) -> tuple[MeasuredSize, MeasuredSize]:
        """The measured sizes around this one; twice the nearest where it is not between two."""
        sizes = self.measured.sizes
        below = [size for size in sizes if size.micro_batch_size <= micro_batch_size]
        above = [size for size in sizes if size.micro_batch_size >= micro_batch_size]
        return (below or above)[-1 if below else 0], (above or below)[0 if above else -1]

    def _on_line(
        self,
        known: tuple[MeasuredLayer, MeasuredLayer],
        below: MeasuredSize,
        above: MeasuredSize,
        micro_batch_size: int,
    ) -> tuple[float, float, float]:
        distance = above.micro_batch_size - below.micro_batch_size
        part = (micro_batch_size - below.micro_batch_size) / distance if distance else 0.0
        first, last = map(_medians, known)
        forward, backward, recompute = (
            self.factor * (a + part * (b - a)) for a, b in zip(first, last, strict=True)
        )
        return forward, backward, recompute

    def _scaled(self, counted: LayerProfile, known: MeasuredLayer) -> tuple[float, float, float]:
        """The roofline of this size times measured over roofline of the nearest size."""
        device = self.cluster.device(0)
        here = layer_seconds(counted, device)
        plain = replace(known.profile, forward_seconds=None, backward_seconds=None)
        there = layer_seconds(plain, device)
        forward, backward, recompute = (
            self.factor * seconds * (now / then if then else 1.0)
            for seconds, now, then in zip(
                _medians(known), (*here, here[0]), (*there, there[0]), strict=True
            )
        )
        return forward, backward, recompute


def apply_profile(
    measured: MeasuredModel,
    graph_at: Callable[[int], LayerGraph],
    counted_at: Callable[[int], Profile],
    cluster: Cluster,
    optimizer_slots: int,
) -> AppliedProfile:
    """The measured profile, where it belongs to the model and the cluster.

    Raises:
        FingerprintError: it was measured of another model.
        UsageError: it was measured with other layers, or on a device that the cluster has not.
    """
    size = measured.sizes[0]
    graph = graph_at(size.micro_batch_size)
    if graph.fingerprint != measured.fingerprint:
        raise FingerprintError(
            f"the profile was measured of another model: {measured.model_name} "
            f"({measured.fingerprint[:8]}), not {graph.model_name} ({graph.fingerprint[:8]})",
            hint=f"{_MEASURE_AGAIN}",
        )
    _check_layers(measured, size, graph)
    warnings = {_check_device(measured.device, host.device, cluster) for host in cluster.hosts}
    factor = 1.0
    if measured.device.kind == "cpu":
        num_processes = max(host.num_devices for host in cluster.hosts)
        factor = max(1.0, num_processes / measured.device.num_cores)
    efficiency = _update_efficiency(size, graph, cluster.device(0), optimizer_slots)
    return AppliedProfile(
        measured=measured,
        graph_at=graph_at,
        counted_at=counted_at,
        cluster=_with_update_efficiency(cluster, efficiency / factor),
        factor=factor,
        warning="; ".join(sorted(warnings - {""})),
    )


def _check_layers(measured: MeasuredModel, size: MeasuredSize, graph: LayerGraph) -> None:
    """Refuse figures of other computations: another batch, loss, sequence length or tracer."""
    known = {name: layer.signature for layer in size.layers for name in layer.layers}
    for layer in graph.layers:
        if known.get(layer.name) != layer.signature:
            raise UsageError(
                f"the profile was measured of another computation: layer {layer.name!r} of "
                f"{measured.model_name} is not what it was, at micro-batches of "
                f"{size.micro_batch_size} (measured with torch {measured.versions.torch})",
                hint="the shapes of example_batch, loss_fn or the version may have changed: "
                f"{_MEASURE_AGAIN}",
            )


def _check_device(measured: MeasuredDevice, device: Device, cluster: Cluster) -> str:
    """A warning, if any, for a device that may be another than the measured one.

    Raises:
        UsageError: it is another.
    """
    known = device_profile(device.name).cuda_names if device.name in device_names() else None
    same_kind = device.synchronous == (measured.kind == "cpu")
    if not same_kind or (known is not None and measured.name not in known):
        raise UsageError(
            f"the profile was measured on {measured.name} ({measured.kind}), but the cluster "
            f"{cluster.name} has {device.name}",
            hint=f"plan for the measured device with --cluster, or {_MEASURE_AGAIN}",
        )
    is_here = measured.kind == "cpu" and cluster.name == "cpu"
    name = processor_name() if is_here else device.name
    if measured.name == name or known is not None or (measured.kind == "cpu" and not is_here):
        return ""
    return f"the profile was measured on {measured.name}, the cluster has {name}"


def _update_efficiency(
    size: MeasuredSize, graph: LayerGraph, device: Device, optimizer_slots: int
) -> float:
    """Part of the memory bandwidth that the measured updates reach; 0 where nothing is updated."""
    specs = {spec.name: spec for spec in graph.parameters if spec.trainable}
    known = _by_name(size)
    modelled = taken = 0.0
    for layer in graph.layers:
        used = [specs[name] for name in layer.parameters if name in specs]
        taken += known[layer.name].update.median
        modelled += sum(
            update_seconds(
                spec.num_elements,
                replace(device, kernel_overhead_seconds=0.0),
                optimizer_slots,
                element_bytes=spec.num_bytes // max(1, spec.num_elements),
            )
            for spec in used
        )
    efficiency = device.update_efficiency or device.memory_efficiency
    return efficiency * modelled / taken if taken else 0.0


def _with_update_efficiency(cluster: Cluster, efficiency: float) -> Cluster:
    hosts = tuple(
        replace(host, device=replace(host.device, update_efficiency=efficiency or None))
        for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts)


def _by_name(size: MeasuredSize) -> Mapping[str, MeasuredLayer]:
    return {name: layer for layer in size.layers for name in layer.layers}


def _medians(layer: MeasuredLayer) -> tuple[float, float, float]:
    return layer.forward.median, layer.backward.median, layer.recompute.median
