"""This machine's CPU as a cluster of processes, measured on the spot in under two seconds.

Knows torch's CPU kernels and gloo over loopback. The figures are those of a quiet moment on one
thread; they are cached, so that one process always sees one machine.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cluster.library import link_spec
from planner.cluster.types import Cluster, Device, Host, Link
from planner.errors import UsageError

if TYPE_CHECKING:
    from planner.cluster.kernels import KernelRates

__all__ = ["measure_cpu"]

_RESERVED_BYTES = 300 * 2**20  # resident size of a Python process that has imported torch
_TRANSFER_DEADLINE_SECONDS = 10.0  # importing torch takes one, on a busy machine several


def measure_cpu(num_processes: int) -> Cluster:
    """One host of `num_processes` processes that share this machine's cores and memory.

    Where there are more processes than cores, each one gets its share of them, for kernels and
    for transfers (a loopback transfer is CPU work).

    Raises:
        UsageError: `num_processes` is below 1.
    """
    if num_processes < 1:
        raise UsageError(f"the number of processes is {num_processes}", hint="ask for at least one")
    machine = _measure_machine()
    rates, transfer = machine.rates, machine.transfer
    share = min(1.0, machine.num_cores / num_processes)
    device = Device(
        name="cpu",
        memory_bytes=machine.memory_bytes // num_processes,
        peak_flops={dtype: flops * share for dtype, flops in rates.peak_flops.items()},
        memory_bandwidth=rates.memory_bandwidth * share,
        kernel_overhead_seconds=rates.kernel_overhead_seconds / share,
        compute_efficiency=rates.compute_efficiency,
        memory_efficiency=rates.memory_efficiency,
        reserved_bytes=_RESERVED_BYTES,
        provenance=machine.provenance,
        synchronous=True,
        random_bandwidth=rates.random_bandwidth * share,
        message_seconds=transfer.message_seconds / share,
    )
    link = replace(transfer.link, bandwidth=transfer.link.bandwidth * share)
    return Cluster(
        name="cpu",
        hosts=(Host(device=device, num_devices=num_processes, link=link),),
        network=link,
        backend="gloo",
        provenance=machine.provenance,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """gloo over loopback."""

    link: Link
    message_seconds: float
    """Processor time of each end of a small message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What this machine has, and what one thread of it reaches."""

    num_cores: int
    memory_bytes: int
    rates: "KernelRates"
    transfer: _Transfer
    provenance: str


@cache
def _measure_machine() -> _Machine:
    # Loads torch, which takes a second, and clusters known by name do not need it.
    from planner.cluster.kernels import measure_kernels

    with ThreadPoolExecutor(max_workers=1) as pool:
        # The transfer's process spends most of its time importing torch, on another core.
        measured = pool.submit(_measure_transfer, _TRANSFER_DEADLINE_SECONDS)
        rates = measure_kernels()
        transfer = measured.result()
    note = "" if transfer else "; loopback transfer could not be measured: documented figures"
    num_cores = _num_cores()
    version = importlib.metadata.version("torch")
    return _Machine(
        num_cores=num_cores,
        memory_bytes=_available_bytes(),
        rates=rates,
        transfer=transfer or _documented_transfer(),
        provenance=(
            f"measured here on {datetime.date.today().isoformat()}: {num_cores} cores "
            f"({platform.machine()}), one thread per process, torch {version}{note}"
        ),
    )


def _measure_transfer(deadline_seconds: float) -> _Transfer | None:
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
    figures: dict[str, float] = json.loads(output)
    if len(figures) < 3:
        return None
    message_seconds = figures.pop("end")
    seconds = {int(num_bytes): value for num_bytes, value in figures.items()}
    small, large = min(seconds), max(seconds)
    latency_seconds = seconds[small]
    link = Link(
        name="loopback",
        bandwidth=large / max(seconds[large] - latency_seconds, 1e-9),
        latency_seconds=latency_seconds,
    )
    return _Transfer(link=link, message_seconds=message_seconds)


def _documented_transfer() -> _Transfer:
    """Where nothing could be measured: a message costs its latency in processor time."""
    link = link_spec("loopback").to_link()
    return _Transfer(link=link, message_seconds=link.latency_seconds)


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
