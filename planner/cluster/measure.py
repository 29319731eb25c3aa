"""This machine's CPU as a cluster of processes, measured on the spot in under two seconds.

Knows torch's CPU kernels and gloo over loopback. The figures are those of a quiet moment on one
thread; they are cached, so that one process always sees one machine.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cluster.library import link_spec
from planner.cluster.types import Cluster, Device, Host, Link
from planner.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["measure_cpu"]

_RESERVED_BYTES = 300 * 2**20  # resident size of a Python process that has imported torch
_BUFFER_BYTES = 64 * 2**20  # beyond most caches: two of them are read and written
_TRANSFER_DEADLINE_SECONDS = 10.0  # importing torch takes one, on a busy machine several


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What one thread of this machine reaches."""

    num_cores: int
    memory_bytes: int
    flops: dict[str, float]
    memory_bandwidth: float
    kernel_overhead_seconds: float
    link: Link
    provenance: str


def measure_cpu(num_processes: int) -> Cluster:
    """One host of `num_processes` processes that share this machine's cores and memory.

    Where there are more processes than cores, each one's flop/s, memory bandwidth and loopback
    bandwidth (a loopback transfer is CPU work) shrink in proportion.

    Raises:
        UsageError: `num_processes` is below 1.
    """
    if num_processes < 1:
        raise UsageError(f"the number of processes is {num_processes}", hint="ask for at least one")
    machine = _measure_machine()
    share = min(1.0, machine.num_cores / num_processes)
    device = Device(
        name="cpu",
        memory_bytes=machine.memory_bytes // num_processes,
        peak_flops={dtype: flops * share for dtype, flops in machine.flops.items()},
        memory_bandwidth=machine.memory_bandwidth * share,
        kernel_overhead_seconds=machine.kernel_overhead_seconds,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=_RESERVED_BYTES,
        provenance=machine.provenance,
    )
    link = Link(
        name=machine.link.name,
        bandwidth=machine.link.bandwidth * share,
        latency_seconds=machine.link.latency_seconds,
    )
    return Cluster(
        name="cpu",
        hosts=(Host(device=device, num_devices=num_processes, link=link),),
        network=link,
        backend="gloo",
        provenance=machine.provenance,
    )


@cache
def _measure_machine() -> _Machine:
    import torch  # takes a second to load, and clusters known by name do not need it

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops = {
            "float32": _matrix_flops(torch.float32, 768),
            "float64": _matrix_flops(torch.float64, 512),
            "bfloat16": _matrix_flops(torch.bfloat16, 256),
        }
        source = torch.ones(_BUFFER_BYTES // 4)
        target = torch.empty_like(source)
        copy_seconds = _best_seconds(lambda: target.copy_(source), repeats=5)
        one = torch.ones(1)
        add_seconds = _best_seconds(lambda: [one + 1 for _ in range(500)], repeats=5) / 500
        transfer = _measure_transfer(_TRANSFER_DEADLINE_SECONDS)
    finally:
        torch.set_num_threads(num_threads)
    note = "" if transfer else "; loopback transfer could not be measured: documented figures"
    num_cores = _num_cores()
    return _Machine(
        num_cores=num_cores,
        memory_bytes=_available_bytes(),
        flops=flops,
        memory_bandwidth=2 * _BUFFER_BYTES / copy_seconds,
        kernel_overhead_seconds=add_seconds,
        link=transfer or link_spec("loopback").to_link(),
        provenance=(
            f"measured here on {datetime.date.today().isoformat()}: {num_cores} cores "
            f"({platform.machine()}), one thread per process, torch {torch.__version__}{note}"
        ),
    )


def _matrix_flops(dtype: "torch.dtype", size: int) -> float:
    """flop/s of a square matrix product on the current threads."""
    import torch

    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return float(2 * size**3) / _best_seconds(lambda: left @ right, repeats=5)


def _best_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Shortest of some runs, the first one (which warms up) left out."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _measure_transfer(deadline_seconds: float) -> Link | None:
    """gloo between two ranks over the loopback interface; None where that does not work."""
    script = Path(__file__).with_name("loopback.py")
    try:
        # -P keeps the script's folder, whose `types` is not Python's, off the import path.
        output = subprocess.run(
            [sys.executable, "-P", str(script), str(deadline_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=deadline_seconds,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    seconds = {int(num_bytes): value for num_bytes, value in json.loads(output).items()}
    if len(seconds) < 2:
        return None
    small, large = min(seconds), max(seconds)
    latency_seconds = seconds[small]
    return Link(
        name="loopback",
        bandwidth=large / max(seconds[large] - latency_seconds, 1e-9),
        latency_seconds=latency_seconds,
    )


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_bytes() -> int:
    """Memory that can be taken without swapping, within the control group's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    information = Path("/proc/meminfo")
    if information.exists():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()).isdigit():
            available = min(available, int(text) - int(Path(usage).read_text()))
    return available
