"""Counts and a device (or a link) -> seconds.

Knows the roofline and messages. Does not know stages, schedules or sharing: what happens when two
transfers meet on one link is the simulator's business.
"""

from collections.abc import Iterable

from planner.cluster.types import Device, Link
from planner.profile import LayerProfile, OperatorCount

__all__ = [
    "copy_seconds",
    "layer_seconds",
    "peak_flops",
    "read_seconds",
    "transfer_seconds",
    "update_seconds",
]

# What stands in for a dtype that a device has no figure for, best first: the other half
# precision runs on the same units; then plain float32, which every device has.
_STAND_INS = {
    "float8_e4m3fn": ("float8_e5m2", "bfloat16", "float16"),
    "float8_e5m2": ("float8_e4m3fn", "bfloat16", "float16"),
    "bfloat16": ("float16",),
    "float16": ("bfloat16",),
    "complex128": ("float64",),
}


def peak_flops(device: Device, dtype: str) -> float:
    """Peak dense flop/s of `device` for `dtype`, before efficiency.

    A dtype without a figure takes the rate of its stand-in: float8 that of half precision,
    bfloat16 and float16 each other's, complex128 that of float64; then, and for any other dtype,
    float32's; on a device without float32, the lowest rate that it has.
    """
    for name in (dtype, *_STAND_INS.get(dtype, ()), "float32"):
        if name in device.peak_flops:
            return device.peak_flops[name]
    return min(device.peak_flops.values())


def layer_seconds(profile: LayerProfile, device: Device) -> tuple[float, float]:
    """Forward and backward seconds of one micro-batch through a layer.

    Measured seconds where the profile has them. Else the roofline (Williams, Waterman and
    Patterson, CACM 52(4), 2009), kernel by kernel:

        max(flop / (peak x compute efficiency), bytes / (bandwidth x memory efficiency), overhead)

    A synchronous device adds the overhead instead, and random numbers have a bandwidth of their
    own where the device says so.
    """
    forward, backward = profile.forward_seconds, profile.backward_seconds
    return (
        _roofline_seconds(profile.forward, device) if forward is None else forward,
        _roofline_seconds(profile.backward, device) if backward is None else backward,
    )


def _roofline_seconds(counts: Iterable[OperatorCount], device: Device) -> float:
    seconds = 0.0
    for count in counts:
        bandwidth = device.memory_bandwidth * device.memory_efficiency
        if count.draws and device.random_bandwidth is not None:
            bandwidth = device.random_bandwidth
        compute = peak_flops(device, count.dtype) * device.compute_efficiency
        work = max(count.flop / compute, count.moved_bytes / bandwidth)
        overhead = device.kernel_overhead_seconds
        kernel_seconds = work + overhead if device.synchronous else max(work, overhead)
        seconds += kernel_seconds * count.num_kernels
    return seconds


def transfer_seconds(num_bytes: int, link: Link) -> float:
    """One message over an idle link: latency + bytes / bandwidth (Hockney, Parallel Computing
    20(3), 1994)."""
    return link.latency_seconds + num_bytes / link.bandwidth


def update_seconds(
    num_elements: int, device: Device, optimizer_slots: int, *, element_bytes: int = 4
) -> float:
    """Optimizer update of `num_elements` parameters, bound by memory.

    Weights, gradients and each slot are read and written once (the gradient is cleared for the
    next step): 2 x (2 + slots) x element bytes per element. That is what a fused optimizer moves,
    so it is a lower bound for others; the arithmetic, about ten flop per element, hides behind it
    on every device (roofline, as in `layer_seconds`).
    """
    moved_bytes = 2 * (2 + optimizer_slots) * element_bytes * num_elements
    bandwidth = device.memory_bandwidth * device.memory_efficiency
    return max(moved_bytes / bandwidth, device.kernel_overhead_seconds)


def copy_seconds(num_bytes: int, device: Device) -> float:
    """A copy within the device's memory: every byte is read and written (roofline)."""
    return read_seconds(2 * num_bytes, device)


def read_seconds(num_bytes: int, device: Device) -> float:
    """One kernel that moves `num_bytes` through the device's memory (roofline); 0 for none."""
    if not num_bytes:
        return 0.0
    seconds = num_bytes / (device.memory_bandwidth * device.memory_efficiency)
    return max(seconds, device.kernel_overhead_seconds)
