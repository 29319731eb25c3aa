"""A CUDA device of this machine: its packaged or reported peaks, and what it reaches of them.

Knows torch.cuda. The peaks come from the packaged profile of the device's name, else from its
clocks; efficiencies, kernel overhead and the way to host memory are measured here, in seconds.
"""

import statistics
from collections.abc import Callable

import torch

from planner.cluster.found import device_from_properties
from planner.cluster.library import device_names, device_profile
from planner.cluster.schema import DeviceProfile, DeviceSpec, Figure, Fraction, Seconds

__all__ = ["known_profile", "measure_gpu"]

_WIDTH = 8192  # of square products
_BUFFER_BYTES = 2**30
_HOST_BYTES = 2**28
_NUM_KERNELS = 1000
_REPEATS = 7
_SOURCE = "measured"


def known_profile(cuda_name: str) -> DeviceProfile | None:
    """The packaged device that torch reports under this name."""
    profiles = map(device_profile, device_names())
    return next((profile for profile in profiles if cuda_name in profile.cuda_names), None)


def measure_gpu(index: int) -> DeviceSpec:
    """CUDA device `index` of this process."""
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(index)
    profile = known_profile(properties.name)
    spec = _reported(properties) if profile is None else profile.device
    with torch.cuda.device(device):
        flops = _product_flops(device, torch.bfloat16)
        bandwidth = _copy_bandwidth(device)
        overhead = _overhead_seconds(device)
        host_bandwidth = _host_bandwidth(device)
    peak = spec.peak_flops.get("bfloat16") or next(iter(spec.peak_flops.values()))
    return spec.model_copy(
        update={
            "compute_efficiency": Fraction(
                value=_part(flops, peak.value),
                source=f"{_SOURCE}: bfloat16 product of {_WIDTH} x {_WIDTH}, {flops:.4g} flop/s",
            ),
            "memory_efficiency": Fraction(
                value=_part(bandwidth, spec.memory_bandwidth.value),
                source=f"{_SOURCE}: copy of {_BUFFER_BYTES} bytes, {bandwidth:.4g} bytes/s",
            ),
            "kernel_overhead_seconds": Seconds(
                value=float(f"{overhead:.3g}"),
                source=f"{_SOURCE}: {_NUM_KERNELS} additions of one number in a row",
            ),
            "host_bandwidth": Figure(
                value=float(f"{host_bandwidth:.4g}"),
                source=f"{_SOURCE}: copy of {_HOST_BYTES} bytes from pinned memory",
            ),
        }
    )


def _reported(properties: object) -> DeviceSpec:
    """A device without a packaged profile, from what torch reports."""
    device = device_from_properties(properties)  # type: ignore[arg-type]
    source = "computed from the clocks that torch reports"
    return DeviceSpec.model_validate(
        {
            "name": device.name,
            "memory_bytes": {"value": device.memory_bytes, "source": "reported by torch"},
            "peak_flops": {
                dtype: {"value": flops, "source": source}
                for dtype, flops in device.peak_flops.items()
            },
            "memory_bandwidth": {"value": device.memory_bandwidth, "source": source},
            "reserved_bytes": {"value": device.reserved_bytes, "source": "assumption"},
            "allocator": "torch-cuda",
        }
    )


def _product_flops(device: torch.device, dtype: torch.dtype) -> float:
    left, right, product = (
        torch.randn(_WIDTH, _WIDTH, device=device, dtype=dtype) for _ in range(3)
    )
    seconds = _median_seconds(lambda: torch.mm(left, right, out=product))
    return float(2 * _WIDTH**3) / seconds


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second."""
    source, target = (torch.empty(_BUFFER_BYTES // 4, device=device) for _ in range(2))
    return 2 * _BUFFER_BYTES / _median_seconds(lambda: target.copy_(source))


def _overhead_seconds(device: torch.device) -> float:
    number = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(_NUM_KERNELS):
            number.add_(1)

    return _median_seconds(run) / _NUM_KERNELS


def _host_bandwidth(device: torch.device) -> float:
    source = torch.empty(_HOST_BYTES // 4, pin_memory=True)
    target = torch.empty(_HOST_BYTES // 4, device=device)
    return _HOST_BYTES / _median_seconds(lambda: target.copy_(source, non_blocking=True))


def _median_seconds(work: Callable[[], object]) -> float:
    """By the device's own clock, the first two runs (which warm up) left out."""
    found = []
    for _ in range(_REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(found[2:])


def _part(reached: float, peak: float) -> float:
    return float(f"{min(1.0, reached / peak):.4g}")
