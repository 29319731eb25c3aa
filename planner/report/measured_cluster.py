"""A measured cluster as tables for the terminal: its devices, links, and every sample.

This module knows rich's tables and what is worth a column. It measures nothing.
"""

from rich.table import Table

from planner.cluster.schema import ClusterFile, DeviceSpec, HostSpec, LinkSpec
from planner.cost.algorithm import measured_collectives, predicted_seconds
from planner.report.plain import plain_table
from planner.report.quantities import bytes_text, seconds_text

__all__ = ["cluster_tables"]


def cluster_tables(file: ClusterFile) -> list[Table]:
    """Devices, links, samples and overlaps; those of which there are none are left out."""
    tables = [_devices(file), _links(file)]
    if file.measured is not None and file.measured.samples:
        tables.append(_samples(file))
    if file.measured is not None and file.measured.overlaps:
        tables.append(_overlaps(file))
    return tables


def _devices(file: ClusterFile) -> Table:
    numbers = ["peak, best dtype", "reached", "memory", "memory rate", "reached", "per kernel"]
    table = plain_table("hosts", ["host", "devices"], [*numbers, "per message"])
    for index, host in enumerate(file.hosts):
        device = host.device
        if isinstance(device, DeviceSpec):
            table.add_row(str(index), f"{host.count} x {device.name}", *_device_cells(device))
    return table


def _device_cells(device: DeviceSpec) -> list[str]:
    peak = max(figure.value for figure in device.peak_flops.values())
    return [
        f"{peak / 1e12:.3g} Tflop/s",
        f"{device.compute_efficiency.value:.0%}",
        bytes_text(device.memory_bytes.value),
        f"{bytes_text(device.memory_bandwidth.value)}/s",
        f"{device.memory_efficiency.value:.0%}",
        seconds_text(device.kernel_overhead_seconds.value),
        seconds_text(device.message_seconds.value),
    ]


def _links(file: ClusterFile) -> Table:
    table = plain_table("links", ["link", "between"], ["latency", "bandwidth"])
    for column in ("both ways at once", "where from"):
        table.add_column(column)
    inside = {_key(host): host.link for host in file.hosts}
    named = [*((link, "devices of a host") for link in inside.values()), (file.network, "hosts")]
    for link, between in named:
        if isinstance(link, LinkSpec):
            table.add_row(
                link.name,
                between,
                seconds_text(link.latency_seconds.value),
                f"{bytes_text(link.bandwidth.value)}/s",
                "each at full rate" if link.duplex else "share the bandwidth",
                link.bandwidth.source,
            )
        else:
            table.add_row(str(link), between, "-", "-", "-", "not measured: the usual figures")
    return table


def _samples(file: ClusterFile) -> Table:
    assert file.measured is not None
    table = plain_table(
        "transfers and collectives",
        ["operation", "where"],
        ["ranks", "bytes", "time", "spread", "rate", "links predict"],
    )
    # Identical keys cannot occur twice, so the predictions are found again by them.
    predicted = {
        (c.operation, c.num_members, c.num_bytes, c.seconds): predicted_seconds(c, file.collectives)
        for c in measured_collectives(file)
    }
    for sample in file.measured.samples:
        key = (sample.operation, sample.ranks, sample.bytes, sample.seconds)
        table.add_row(
            sample.operation,
            sample.where,
            str(sample.ranks),
            bytes_text(sample.bytes),
            seconds_text(sample.seconds),
            f"{sample.spread:.0%}",
            f"{bytes_text(sample.bytes / sample.seconds)}/s" if sample.seconds else "-",
            seconds_text(predicted[key]) if key in predicted else "-",
        )
    return table


def _overlaps(file: ClusterFile) -> Table:
    assert file.measured is not None
    table = plain_table(
        "beside a computation as long as the operation",
        ["operation", "where"],
        ["ranks", "bytes", "hidden", "computation slower by"],
    )
    for overlap in file.measured.overlaps:
        table.add_row(
            overlap.operation,
            overlap.where,
            str(overlap.ranks),
            bytes_text(overlap.bytes),
            f"{overlap.hidden:.0%}",
            f"{overlap.slowdown:.0%}",
        )
    return table


def _key(host: HostSpec) -> str:
    return host.link if isinstance(host.link, str) else host.link.name if host.link else ""
