"""The GPUs of this machine as a cluster of one host.

Knows torch.cuda's device properties. What it cannot see, it assumes and says so: links between
GPUs that match no packaged device count as PCIe 4.
"""

from typing import Protocol

from planner.cluster.library import device_names, device_profile, link_spec, usual_network
from planner.cluster.types import Allocator, Cluster, Device, Host

__all__ = ["GpuProperties", "device_from_properties", "found_cluster", "num_gpus_found"]

_FALLBACK_CLOCK_HERTZ = 1.4e9
_FALLBACK_BANDWIDTH = 0.5e12
# flop per clock and multiprocessor, dense: plain FP32, and half precision in tensor cores. From
# NVIDIA's architecture whitepapers: Volta, Turing, Ampere, Ada, Hopper, Blackwell. Where consumer
# and server boards of one architecture differ, the lower figure.
_FLOP_PER_CLOCK = {
    (7, 0): (128, 1024),
    (7, 5): (128, 1024),
    (8, 0): (128, 2048),
    (8, 6): (256, 512),
    (8, 9): (256, 512),
    (9, 0): (256, 4096),
    (10, 0): (256, 8192),
    (12, 0): (256, 512),
}
_UNKNOWN_FLOP_PER_CLOCK = (128, 512)


class GpuProperties(Protocol):
    """What is read of `torch.cuda.get_device_properties`."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    clock_rate: int
    """kHz."""
    memory_clock_rate: int
    """kHz."""
    memory_bus_width: int
    """Bits."""


def num_gpus_found() -> int:
    """How many CUDA devices torch can use here."""
    import torch  # takes a second to load, and clusters known by name do not need it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def found_cluster(num_devices: int) -> Cluster:
    """The first `num_devices` GPUs of this machine; there must be as many."""
    import torch

    found: list[GpuProperties] = [
        torch.cuda.get_device_properties(index) for index in range(num_devices)
    ]
    # One host holds equal devices, so a mixed one is planned for its smallest.
    smallest = min(found, key=lambda properties: properties.total_memory)
    provenance = f"found on this machine: {num_devices} x {smallest.name}"
    for name in device_names():
        profile = device_profile(name)
        if smallest.name in profile.cuda_names:
            device = profile.device.to_device(f"profile {name}")
            link = link_spec(profile.host.link).to_link()
            network = usual_network(profile)
            break
    else:
        device = device_from_properties(smallest)
        link = link_spec("pcie4").to_link()
        network = link_spec("ethernet-25").to_link()
        provenance += ", no packaged profile; assumed: PCIe 4 between them"
    return Cluster(
        name=device.name,
        hosts=(Host(device=device, num_devices=num_devices, link=link),),
        network=network,
        backend="nccl",
        provenance=provenance,
    )


def device_from_properties(properties: GpuProperties) -> Device:
    """A GPU without a packaged profile: peak = flop per clock x multiprocessors x clock."""
    clock = getattr(properties, "clock_rate", 0) * 1e3 or _FALLBACK_CLOCK_HERTZ
    plain, tensor = _FLOP_PER_CLOCK.get(
        (properties.major, properties.minor), _UNKNOWN_FLOP_PER_CLOCK
    )
    per_clock = properties.multi_processor_count * clock
    # Two transfers per clock of the memory, and eight bits in a byte.
    bits = getattr(properties, "memory_bus_width", 0)
    bandwidth = 2e3 * getattr(properties, "memory_clock_rate", 0) * bits / 8
    peak_flops = {"float32": plain * per_clock, "float16": tensor * per_clock}
    # Tensor cores take bfloat16 from compute capability 8 on.
    peak_flops["bfloat16"] = peak_flops["float16" if properties.major >= 8 else "float32"]
    return Device(
        name=properties.name,
        memory_bytes=properties.total_memory,
        peak_flops=peak_flops,
        memory_bandwidth=bandwidth or _FALLBACK_BANDWIDTH,
        kernel_overhead_seconds=5e-6,
        compute_efficiency=0.75,
        memory_efficiency=0.85,
        reserved_bytes=2 * 2**30,
        provenance=(
            "no packaged profile: peak flop/s and bandwidth computed from the clocks that torch "
            "reports; overhead, efficiencies and reserved memory assumed"
        ),
        allocator=Allocator(),
    )
