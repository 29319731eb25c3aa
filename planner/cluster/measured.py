"""What ranks measured of their hosts and links -> the cluster file that says so.

Knows how samples become the figures of a link, and how a file is written so that it reads back.
Does not know how anything is measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from planner.cluster.fit import AffineLaw, fit_affine
from planner.cluster.samples import MeasuredSpec, SampleSpec, Where
from planner.cluster.schema import (
    Bytes,
    ClassRates,
    ClusterFile,
    DeviceSpec,
    Figure,
    Fraction,
    HostSpec,
    LinkSpec,
    RatesSpec,
    Seconds,
)
from planner.cluster.types import Device, OperatorRates

__all__ = [
    "FoundHost",
    "LinkFigures",
    "assemble",
    "cluster_text",
    "device_spec",
    "link_figures",
]

_HALF_DUPLEX = 1.5
"""Both directions at once take this much longer than one: 1 where they do not meet, 2 where they
share everything."""
_CROWDED = 0.9
"""Below this part of a lone pair's rate, pairs that talk at once share something."""
_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """A link as the planner reads it, and what its figures were made of."""

    spec: LinkSpec
    law: AffineLaw
    """Of one direction of one pair alone."""
    both_ways: float
    """Seconds of both directions at once over those of one, for the largest message."""
    share: float
    """Rate of a pair while all pairs talk, as a part of its rate alone; at most 1."""
    num_pairs: int
    """How many talked at once for that."""


def link_figures(samples: Sequence[SampleSpec], where: Where, name: str) -> LinkFigures | None:
    """The link that samples of `send`, `exchange` and `crowd` describe; None without any.

    Inside a host the bandwidth is that of a pair while all ranks of the host talk, because that is
    what a step does. Between hosts it is that of a lone pair: what pairs share there is the hosts'
    adapters, which a cluster file describes by themselves.
    """
    here = [sample for sample in samples if sample.where == where]
    points = _by_size(here, "send")
    if not points:
        return None
    spreads = {s.bytes: s.spread for s in here if s.operation == "send"}
    law = fit_affine(points, spreads)
    largest = max(points)
    exchange = _by_size(here, "exchange").get(largest, points[largest])
    both_ways = exchange / points[largest]
    crowd = [sample for sample in here if sample.operation == "crowd"]
    share = min(1.0, exchange / crowd[-1].seconds) if crowd else 1.0
    bandwidth = law.bandwidth * (share if where == "inside" else 1.0)
    source = f"measured: sends of {min(points)} to {largest} bytes, fit within {law.residual:.1%}"
    if where == "inside" and share < 1.0:
        source += f"; times {share:.2f}, the rate while all {crowd[-1].ranks} ranks talk"
    spec = LinkSpec(
        name=name,
        bandwidth=Figure(value=_short(bandwidth), source=source),
        latency_seconds=Seconds(value=_short(law.latency_seconds), source=source.split(";")[0]),
        duplex=both_ways < _HALF_DUPLEX,
    )
    num_pairs = crowd[-1].ranks // 2 if crowd else 1
    return LinkFigures(spec=spec, law=law, both_ways=both_ways, share=share, num_pairs=num_pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundHost:
    """One host, as its first rank found it."""

    device: DeviceSpec
    num_devices: int
    usual_link: str
    """Name of a packaged link, where no two ranks of a host could measure one."""
    usual_network: str
    """The same between hosts."""


def assemble(
    name: str, backend: str, hosts: Sequence[FoundHost], measured: MeasuredSpec
) -> ClusterFile:
    """The cluster that the hosts and the samples of `measured` describe.

    Hosts of one size with devices of one name get the median figures of all of them: noise would
    make unlike hosts of like ones. What no two ranks could measure has its usual figures, and a
    note says so.
    """
    inside = link_figures(measured.samples, "inside", "measured link")
    between = link_figures(measured.samples, "between", "measured network")
    notes = list(measured.notes)
    if inside is None:
        notes.append(f"link: not measured, no host has two ranks; {hosts[0].usual_link} assumed")
    if between is None:
        notes.append(f"network: not measured, one host; {hosts[0].usual_network} assumed")
    adapters = _adapters(between)
    alike: dict[tuple[str, int], list[DeviceSpec]] = {}
    for host in hosts:
        alike.setdefault((host.device.name, host.num_devices), []).append(host.device)
    typical = {key: _median_device(devices) for key, devices in alike.items()}
    return ClusterFile(
        name=name,
        hosts=[
            HostSpec(
                device=typical[host.device.name, host.num_devices],
                count=host.num_devices,
                link=host.usual_link if inside is None else inside.spec,
                adapter_bandwidth=adapters,
            )
            for host in hosts
        ],
        network=hosts[0].usual_network if between is None else between.spec,
        backend=backend,
        measured=measured.model_copy(update={"notes": notes}),
    )


def _adapters(network: LinkFigures | None) -> Figure | None:
    """Of a host, where its devices cannot all use the network in full at once."""
    if network is None or network.share >= _CROWDED:
        return None
    total = network.law.bandwidth * network.share * network.num_pairs
    words = f"measured: {network.num_pairs} pairs between two hosts at once"
    return Figure(value=_short(total), source=words)


def device_spec(device: Device, source: str, message_seconds: float) -> DeviceSpec:
    """The file form of a device whose figures were all found in one way."""

    def figure(value: float) -> Figure:
        return Figure(value=_short(value), source=source)

    def rates_spec(rates: OperatorRates) -> RatesSpec:
        return RatesSpec(
            compute_efficiency=Fraction(value=_short(rates.compute_efficiency), source=source),
            memory_efficiency=Fraction(value=_short(rates.memory_efficiency), source=source),
            half_flop=Bytes(value=_short(rates.half_flop), source=source),
            half_bytes=Bytes(value=_short(rates.half_bytes), source=source),
        )

    classes = {kind.value: rates_spec(rates) for kind, rates in device.rates.items()}
    drawing, launch = device.random_bandwidth, device.launch_seconds
    return DeviceSpec(
        name=device.name,
        memory_bytes=Bytes(value=device.memory_bytes, source=source),
        peak_flops={dtype: figure(flops) for dtype, flops in device.peak_flops.items()},
        memory_bandwidth=figure(device.memory_bandwidth),
        reserved_bytes=Bytes(value=device.reserved_bytes, source="resident size of a process"),
        kernel_overhead_seconds=Seconds(
            value=_short(device.kernel_overhead_seconds), source=source
        ),
        compute_efficiency=Fraction(value=_short(device.compute_efficiency), source=source),
        memory_efficiency=Fraction(value=_short(device.memory_efficiency), source=source),
        rates=ClassRates(**classes) if classes else None,
        launch_seconds=Seconds(value=_short(launch), source=source) if launch else None,
        synchronous=device.synchronous,
        random_bandwidth=None if drawing is None else figure(drawing),
        message_seconds=Seconds(
            value=_short(message_seconds),
            source="measured: processor time of each end of a small message",
        ),
    )


def cluster_text(file: ClusterFile) -> str:
    """The file as YAML that `planner.cluster.description.read_cluster` reads."""
    data = file.model_dump(mode="json", exclude_defaults=True)
    measured = data.get("measured", {})
    for key in ("samples", "overlaps"):
        if key in measured:
            measured[key] = [_Row(row) for row in measured[key]]
    head = "# Written by lga-profile --cluster. Bytes, seconds, bytes/s and flop/s.\n"
    if isinstance(file.measured, MeasuredSpec):
        head += f"# Measured on {file.measured.date}: {file.measured.command}\n"
    return head + yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, width=100, default_flow_style=False
    )


class _Row(dict[str, Any]):
    """A mapping on one line."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors: equal figures are written out."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_Dumper.add_representer(
    _Row,
    lambda dumper, row: dumper.represent_mapping(
        "tag:yaml.org,2002:map", row.items(), flow_style=True
    ),
)


def _by_size(samples: Sequence[SampleSpec], operation: str) -> dict[int, float]:
    return {s.bytes: s.seconds for s in samples if s.operation == operation and s.seconds > 0}


def _median_device(devices: Sequence[DeviceSpec]) -> DeviceSpec:
    """Every figure the median of the devices'."""
    merged = _median([device.model_dump() for device in devices])
    return DeviceSpec.model_validate(merged)


def _median(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _median([value[key] for value in values]) for key in first}
    if isinstance(first, int | float) and not isinstance(first, bool):
        return float(f"{statistics.median(values):.10g}")
    return first


def _short(value: float) -> float:
    """Measured figures have few digits."""
    return float(f"{value:.{_DIGITS}g}")
