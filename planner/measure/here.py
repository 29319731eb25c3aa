"""The device that a profile is measured on, here: found, named, and set up.

It knows this machine. It does not know models.
"""

import os
import platform
from pathlib import Path

import torch

from planner.errors import UsageError
from planner.measure.measured import MeasuredDevice, Versions

__all__ = [
    "default_device_kind",
    "describe_device",
    "find_device",
    "processor_name",
    "versions_here",
]


def default_device_kind() -> str:
    """CUDA where torch can use it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(kind: str, num_threads: int) -> torch.device:
    """The device to measure on; on a CPU torch then uses `num_threads` threads.

    Raises:
        UsageError: there is no such device here.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} finds no CUDA device here",
            hint="measure with --device cpu, or on a machine with a GPU and a torch that was built "
            "for it",
        )
    if kind == "cpu":
        torch.set_num_threads(num_threads)
    return torch.device(kind)


def describe_device(device: torch.device) -> MeasuredDevice:
    """What a profile says of the device."""
    is_cuda = device.type == "cuda"
    return MeasuredDevice(
        kind="cuda" if is_cuda else "cpu",
        name=torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        num_threads=1 if is_cuda else torch.get_num_threads(),
        num_cores=_num_cores(),
    )


def versions_here() -> Versions:
    """Of Python, torch and CUDA."""
    return Versions(
        python=platform.python_version(), torch=str(torch.__version__), cuda=torch.version.cuda
    )


def processor_name() -> str:
    """As the kernel calls it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
