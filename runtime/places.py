"""Which ranks share a host, and what device each host has.

Knows host names and devices. Does not know what is measured between ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from planner.cluster.accelerator import known_profile, measure_gpu
from planner.cluster.measure import measure_cpu
from planner.cluster.measured import FoundHost, device_spec
from planner.errors import UsageError
from runtime.probe import wait_for_all

__all__ = ["Place", "check_devices", "find_hosts", "first_of_host", "notes_on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is, as it says itself."""

    host_name: str
    device_name: str


def check_devices(kind: str, num_needed: int) -> None:
    num_gpus = torch.cuda.device_count() if kind == "cuda" else num_needed
    if num_gpus < num_needed:
        raise UsageError(
            f"--device cuda needs {num_needed} GPUs on this machine, torch finds {num_gpus}",
            hint="start as many processes as there are GPUs, or measure with --device cpu",
        )


def find_hosts(
    host_name: str, device: torch.device, world_size: int
) -> tuple[list[range], list[Place]]:
    """World ranks of each host, and where every rank is.

    Raises:
        UsageError: ranks of a host do not follow each other, or have unlike devices.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    mine = Place(host_name=host_name, device_name=name)
    places = [mine] * world_size
    dist.all_gather_object(places, mine)
    hosts: list[range] = []
    for rank, place in enumerate(places):
        if rank and place.host_name == places[rank - 1].host_name:
            hosts[-1] = range(hosts[-1].start, rank + 1)
            if place != places[rank - 1]:
                raise UsageError(
                    f"ranks {rank - 1} and {rank} on host {place.host_name} drive unlike devices, "
                    f"{places[rank - 1].device_name} and {place.device_name}",
                    hint="a host of a cluster file has equal devices: measure its halves apart",
                )
        else:
            hosts.append(range(rank, rank + 1))
    names = [places[host.start].host_name for host in hosts]
    if len(set(names)) < len(names):
        raise UsageError(
            f"the ranks of a host do not follow each other: hosts by rank are {', '.join(names)}",
            hint="number the ranks host by host, as torchrun does, or name hosts apart with "
            "--host-name",
        )
    return hosts, places


def first_of_host(
    rank: int, hosts: Sequence[range], device: torch.device, message_seconds: float
) -> FoundHost | None:
    """What the first rank of each host finds out about its device, while the others wait."""
    wait_for_all(device)
    host = next(host for host in hosts if rank in host)
    found = None
    if rank == host.start:
        if device.type == "cuda":
            profile = known_profile(torch.cuda.get_device_name(device))
            found = FoundHost(
                device=measure_gpu(device.index),
                num_devices=len(host),
                usual_link="pcie4" if profile is None else profile.host.link,
                usual_network="ethernet-25" if profile is None else profile.network.link,
            )
        else:
            spec = device_spec(
                measure_cpu(len(host)).hosts[0].device,
                f"measured: torch's kernels on one thread, shared by {len(host)} processes",
                message_seconds,
            )
            found = FoundHost(
                device=spec,
                num_devices=len(host),
                usual_link="loopback",
                usual_network="loopback",
            )
    wait_for_all(device)
    return found


def notes_on(places: Sequence[Place], hosts: Sequence[range]) -> list[str]:
    return [
        f"host {index}: ranks {host.start} to {host.stop - 1} ({places[host.start].device_name})"
        for index, host in enumerate(hosts)
    ]
