"""A user's cluster file -> Cluster.

    name: two-hosts
    hosts:
      - {device: a100-80, count: 8, link: nvlink3}
      - {device: a100-80, count: 8}
    network: {name: shared-25, bandwidth: 0.39e9, latency_seconds: 30e-6}
    collectives: auto

Names refer to packaged devices and links; anything may be described inline instead. Bandwidths
are those of one device and one direction. Where devices share adapters, give each one's part, or
the whole as the network's bandwidth and a host's `adapter_bandwidth`, which its devices share.
"""

from pathlib import Path

from planner.cluster.files import read_text, validate
from planner.cluster.library import device_profile, link_spec, usual_network
from planner.cluster.measure import measure_cpu
from planner.cluster.schema import ClusterFile, HostSpec, LinkSpec
from planner.cluster.types import Cluster, Device, Host, Link
from planner.errors import ClusterError

__all__ = ["read_cluster"]


def read_cluster(path: Path, num_devices: int) -> Cluster:
    """The first `num_devices` devices of the cluster that a file describes.

    Raises:
        ClusterError: the file is missing, does not validate, names an unknown device or link, or
            has fewer devices.
    """
    file = path.name
    spec = validate(ClusterFile, read_text(path), file)
    available = sum(host.count for host in spec.hosts)
    if available < num_devices:
        raise ClusterError(
            f"{file}: hosts hold {available} devices, but {num_devices} are asked for",
            hint=f"ask for at most {available}, or add hosts to the file",
        )
    hosts: list[Host] = []
    for index, host in enumerate(spec.hosts):
        num_left = num_devices - sum(known.num_devices for known in hosts)
        if num_left:
            hosts.append(_host(host, min(host.count, num_left), f"{file}: hosts.{index}"))
    uses_cpu = any(host.device == "cpu" for host in spec.hosts)
    return Cluster(
        name=spec.name or path.stem,
        hosts=tuple(hosts),
        network=_network(spec, file),
        backend=spec.backend or ("gloo" if uses_cpu else "nccl"),
        provenance=_provenance(spec, file),
        collectives=spec.collectives,
    )


def _provenance(spec: ClusterFile, file: str) -> str:
    if spec.measured is None:
        return f"read from {file}"
    versions = ", ".join(f"{name} {version}" for name, version in spec.measured.versions.items())
    return f"read from {file}, measured on {spec.measured.date} ({versions})"


def _host(spec: HostSpec, num_devices: int, where: str) -> Host:
    if spec.device == "cpu":
        # All of the host's processes share its cores, those beyond num_devices stay idle.
        host = measure_cpu(num_devices).hosts[0]
        link = host.link if spec.link is None else _link(spec.link)
        return _made(spec, host.device, num_devices, link)
    if isinstance(spec.device, str):
        profile = device_profile(spec.device)
        device = profile.device.to_device(f"profile {spec.device}")
        link = _link(profile.host.link if spec.link is None else spec.link)
        return _made(spec, device, num_devices, link)
    if spec.link is None:
        raise ClusterError(
            f"{where}.link is missing: the inline device {spec.device.name!r} has no usual link",
            hint="name one, such as nvlink3, pcie4 or loopback, or describe it",
        )
    device = spec.device.to_device(where.partition(":")[0])
    return _made(spec, device, num_devices, _link(spec.link))


def _made(spec: HostSpec, device: Device, num_devices: int, link: Link) -> Host:
    adapters = spec.adapter_bandwidth
    return Host(
        device=device,
        num_devices=num_devices,
        link=link,
        adapter_bandwidth=None if adapters is None else adapters.value,
    )


def _network(spec: ClusterFile, file: str) -> Link:
    if spec.network is not None:
        return _link(spec.network)
    device = spec.hosts[0].device
    if device == "cpu":
        return link_spec("loopback").to_link()
    if isinstance(device, str):
        return usual_network(device_profile(device))
    raise ClusterError(
        f"{file}: network is missing: the inline device {device.name!r} has no usual network",
        hint="name one, such as ib-hdr-200 or ethernet-25, or describe it",
    )


def _link(link: str | LinkSpec) -> Link:
    return (link_spec(link) if isinstance(link, str) else link).to_link()
