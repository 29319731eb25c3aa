"""Counts and a device (or a link) -> seconds.

Knows the roofline and messages. Does not know stages, schedules or sharing: what happens when two
transfers meet on one link is the simulator's business.
"""

from collections.abc import Iterable

from planner.cluster.types import Device, Link
from planner.profile import LayerProfile, OperatorCount

__all__ = [
    "copy_seconds",
    "kernel_seconds",
    "kernels_seconds",
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

    Measured seconds where the profile has them, else those of `kernels_seconds`.
    """
    forward, backward = profile.forward_seconds, profile.backward_seconds
    return (
        kernels_seconds(profile.forward, device) if forward is None else forward,
        kernels_seconds(profile.backward, device) if backward is None else backward,
    )


def kernels_seconds(
    counts: Iterable[OperatorCount],
    device: Device,
    *,
    collective_seconds: float = 0.0,
    waiting_seconds: float = 0.0,
) -> float:
    """Seconds of kernels that run one after the other, behind the host that launches them.

    The roofline (Williams, Waterman and Patterson, CACM 52(4), 2009), kernel by kernel, at the
    rates of the kernel's class:

        max((flop + half flop) / (peak x compute efficiency),
            (bytes + half bytes) / (bandwidth x memory efficiency), overhead)

    so that a kernel of half_flop flop reaches half of the rate (the n 1/2 of Hockney and Jesshope,
    Parallel Computers 2, 1988). A synchronous device adds the overhead instead, and random numbers
    have a bandwidth of their own where the device says so.

    The host needs `launch_seconds` per kernel; where that is longer, the kernels wait for it.
    `collective_seconds` of collectives queue among the kernels; `waiting_seconds` are what the host
    loses to them.
    """
    num_kernels = 0
    seconds = collective_seconds
    for count in counts:
        seconds += kernel_seconds(count, device) * count.num_kernels
        num_kernels += count.num_kernels
    return max(seconds, device.launch_seconds * num_kernels + waiting_seconds)


def kernel_seconds(count: OperatorCount, device: Device) -> float:
    """Seconds of one of the kernels that `count` counts; see `kernels_seconds`."""
    rates = device.operator_rates(count.kind)
    bandwidth = device.memory_bandwidth * rates.memory_efficiency
    if count.draws and device.random_bandwidth is not None:
        bandwidth = device.random_bandwidth
    work = (count.moved_bytes + rates.half_bytes) / bandwidth
    if count.flop:
        compute = peak_flops(device, count.dtype) * rates.compute_efficiency
        work = max(work, (count.flop + rates.half_flop) / compute)
    overhead = device.kernel_overhead_seconds
    return work + overhead if device.synchronous else max(work, overhead)


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
    so it is a lower bound for others, where none was measured; the arithmetic, about ten flop per
    element, hides behind it on every device (roofline, as in `layer_seconds`).
    """
    moved_bytes = 2 * (2 + optimizer_slots) * element_bytes * num_elements
    efficiency = device.update_efficiency or device.memory_efficiency
    bandwidth = device.memory_bandwidth * efficiency
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
