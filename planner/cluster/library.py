"""The packaged devices and links, by name.

Knows the package `profiles`. Does not know users' files nor this machine.
"""

import math
from functools import cache
from importlib import resources

from planner.cluster.files import did_you_mean, validate
from planner.cluster.schema import DeviceProfile, LinkFile, LinkSpec
from planner.cluster.types import Cluster, Device, Host, Link
from planner.errors import ClusterError

__all__ = [
    "device_names",
    "device_profile",
    "link_spec",
    "named_device",
    "usual_cluster",
    "usual_network",
]

_LINKS = "links.yaml"


@cache
def device_names() -> tuple[str, ...]:
    """Names of the packaged devices, sorted."""
    files = (file.name for file in resources.files("profiles").joinpath("hardware").iterdir())
    return tuple(
        sorted(
            name.removesuffix(".yaml")
            for name in files
            if name.endswith(".yaml") and name != _LINKS
        )
    )


@cache
def device_profile(name: str) -> DeviceProfile:
    """The packaged device `name`.

    Raises:
        ClusterError: no such device.
    """
    if name not in device_names():
        known = [*device_names(), "cpu"]
        suggestion = did_you_mean(name, known)
        raise ClusterError(
            f"unknown device {name!r}; known: {', '.join(known)}",
            hint=suggestion or "use a known name, or describe the device in a cluster file",
        )
    return validate(DeviceProfile, _text(f"{name}.yaml"), f"{name}.yaml")


@cache
def named_device(name: str) -> Device:
    """The same as the solver reads it: one object, however many hosts have it.

    Raises:
        ClusterError: no such device.
    """
    return device_profile(name).device.to_device(f"profile {name}")


@cache
def link_spec(name: str) -> LinkSpec:
    """The packaged link `name`.

    Raises:
        ClusterError: no such link.
    """
    links = {link.name: link for link in validate(LinkFile, _text(_LINKS), _LINKS).links}
    if name not in links:
        suggestion = did_you_mean(name, list(links))
        raise ClusterError(
            f"unknown link {name!r}; known: {', '.join(links)}",
            hint=suggestion or "use a known name, or describe the link in the cluster file",
        )
    return links[name]


def usual_network(profile: DeviceProfile) -> Link:
    """The network a packaged device usually comes with, at each device's own share."""
    return link_spec(profile.network.link).to_link(profile.network.adapters_per_device.value)


def usual_cluster(name: str, num_devices: int, provenance: str) -> Cluster:
    """`num_devices` packaged devices in their usual hosts; the last host may be smaller.

    Raises:
        ClusterError: no such device.
    """
    profile = device_profile(name)
    device = named_device(name)
    link = link_spec(profile.host.link).to_link()
    full = profile.host.num_devices.value
    num_hosts = math.ceil(num_devices / full)
    return Cluster(
        name=name,
        hosts=tuple(
            Host(device=device, num_devices=min(full, num_devices - index * full), link=link)
            for index in range(num_hosts)
        ),
        network=usual_network(profile),
        backend="nccl",
        provenance=provenance,
    )


def _text(file: str) -> str:
    return resources.files("profiles").joinpath("hardware", file).read_text(encoding="utf-8")
