"""A user's cluster file -> Cluster.

    name: five-hosts
    hosts:
      - {name: new, device: h100-sxm, count: 8, copies: 2}
      - {name: old, device: a100-80, count: 8, link: nvlink3, memory_bytes: 1e12}
      - {name: far, device: a100-80, count: 4, copies: 2}
    network: {name: shared-25, bandwidth: 0.39e9, latency_seconds: 30e-6}
    links:
      - {between: [new, new], link: ib-ndr-400}
      - {between: [new, old], link: ib-hdr-200}
    collectives: auto

Names refer to packaged devices and links; anything may be described inline instead. Bandwidths
are those of one device and one direction. Where devices share adapters, give each one's part, or
the whole as the network's bandwidth and a host's `adapter_bandwidth`, which its devices share.
Hosts without a link of their own are on the network; without a network every two hosts need one.
"""

import itertools
from pathlib import Path

from planner.cluster.files import did_you_mean, read_text, validate
from planner.cluster.library import device_profile, link_spec, named_device, usual_network
from planner.cluster.measure import measure_cpu
from planner.cluster.schema import ClusterFile, HostSpec, LinkSpec
from planner.cluster.types import Cluster, Device, Host, HostLink, Link
from planner.errors import ClusterError

__all__ = ["read_cluster"]


def read_cluster(path: Path, num_devices: int) -> Cluster:
    """The first `num_devices` devices of the cluster that a file describes.

    Raises:
        ClusterError: the file is missing, does not validate, names an unknown device or link,
            leaves two hosts without a link, or has fewer devices.
    """
    file = path.name
    spec = validate(ClusterFile, read_text(path), file)
    available = sum(host.count * host.copies for host in spec.hosts)
    if available < num_devices:
        raise ClusterError(
            f"{file}: hosts hold {available} devices, but {num_devices} are asked for",
            hint=f"ask for at most {available}, or add hosts to the file",
        )
    host_links = _host_links(spec, file)
    hosts: list[Host] = []
    num_left = num_devices
    for index, host in enumerate(spec.hosts):
        where = f"{file}: hosts.{index}"
        full, part = divmod(min(num_left, host.count * host.copies), host.count)
        hosts += [_host(host, host.count, where)] * full if full else []
        hosts += [_host(host, part, where)] if part else []
        num_left -= full * host.count + part
    uses_cpu = any(host.device == "cpu" for host in spec.hosts)
    return Cluster(
        name=spec.name or path.stem,
        hosts=tuple(hosts),
        network=_network(spec, host_links, file),
        backend=spec.backend or ("gloo" if uses_cpu else "nccl"),
        provenance=_provenance(spec, file),
        collectives=spec.collectives,
        host_links=host_links,
    )


def _host_links(spec: ClusterFile, file: str) -> tuple[HostLink, ...]:
    """The links that the file gives between named hosts.

    Raises:
        ClusterError: a name is unknown or stands twice, a pair stands twice, or there is neither
            a network nor a link between two hosts.
    """
    copies = {host.name: host.copies for host in spec.hosts if host.name is not None}
    if len(copies) < sum(host.name is not None for host in spec.hosts):
        raise ClusterError(
            f"{file}: two hosts have one name: {', '.join(str(host.name) for host in spec.hosts)}",
            hint="name each differently, or give one of them `copies`",
        )
    found: dict[frozenset[str], Link] = {}
    for index, own in enumerate(spec.links):
        where = f"{file}: links.{index}.between = [{', '.join(own.between)}]"
        for name in own.between:
            if name not in copies:
                raise ClusterError(
                    f"{where}: no host has the name {name!r}",
                    hint=did_you_mean(name, list(copies)) or f"add `name: {name}` to a host",
                )
        pair = frozenset(own.between)
        if pair in found:
            raise ClusterError(f"{where}: this pair stands twice", hint="keep one of the two")
        if len(pair) == 1 and copies[own.between[0]] == 1:
            raise ClusterError(
                f"{where}: {own.between[0]!r} is one host",
                hint="the link of a host's own devices is its `link`; or give it `copies`",
            )
        found[pair] = _link(own.link)
    if spec.links and spec.network is None:
        _refuse_missing(spec, set(found), file)
    return tuple(
        HostLink(between=(min(pair), max(pair)), link=link) for pair, link in found.items()
    )


def _refuse_missing(spec: ClusterFile, found: set[frozenset[str]], file: str) -> None:
    """Without a network every two hosts need a link."""
    names = [host.name or f"hosts.{index}" for index, host in enumerate(spec.hosts)]
    alike = [(name, name) for name, host in zip(names, spec.hosts, strict=True) if host.copies > 1]
    for one, two in (*alike, *itertools.combinations(names, 2)):
        if frozenset((one, two)) not in found:
            raise ClusterError(
                f"{file}: no link between {one} and {two}: `links` has {len(found)} pairs, and "
                "there is no `network`",
                hint=f"add {{between: [{one}, {two}], link: ...}}, or a `network` for all others",
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
        link = _link(profile.host.link if spec.link is None else spec.link)
        return _made(spec, named_device(spec.device), num_devices, link)
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
        memory_bytes=None if spec.memory_bytes is None else int(spec.memory_bytes.value),
        name=spec.name or "",
        memory_bandwidth=None if spec.memory_bandwidth is None else spec.memory_bandwidth.value,
    )


def _network(spec: ClusterFile, host_links: tuple[HostLink, ...], file: str) -> Link:
    if spec.network is not None:
        return _link(spec.network)
    if host_links:
        return min((own.link for own in host_links), key=lambda link: link.bandwidth)
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
