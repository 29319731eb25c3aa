"""How fast one thread of this machine's CPU runs torch's kernels, measured in about a second.

Large square products give the peak; what training does with it, in linear layers forward and
backward and in element-wise kernels, gives the efficiencies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from planner.measure.counter import KernelCounter

__all__ = ["KernelRates", "measure_kernels"]

_BUFFER_BYTES = 64 * 2**20  # beyond most caches: two of them are read and written
_ROWS, _WIDTH = 256, 128  # of a small training step's activations
_NUM_BLOCKS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRates:
    """What one thread reaches; see `planner.cluster.types.Device` for the meanings."""

    peak_flops: dict[str, float]
    memory_bandwidth: float
    kernel_overhead_seconds: float
    compute_efficiency: float
    memory_efficiency: float
    random_bandwidth: float


def measure_kernels() -> KernelRates:
    """Measure on one thread; the number of threads is as before afterwards."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak_flops = {
            "float32": _matrix_flops(torch.float32, 768),
            "float64": _matrix_flops(torch.float64, 512),
            "bfloat16": _matrix_flops(torch.bfloat16, 256),
        }
        memory_bandwidth = _copy_bandwidth()
        values = torch.randn(_ROWS, 4 * _WIDTH)
        drawn_seconds = _best_seconds(lambda: values.bernoulli_(0.1), repeats=5)
        return KernelRates(
            peak_flops=peak_flops,
            memory_bandwidth=memory_bandwidth,
            kernel_overhead_seconds=_overhead_seconds(),
            compute_efficiency=min(1.0, _linear_flops() / peak_flops["float32"]),
            memory_efficiency=min(1.0, _elementwise_bandwidth(values) / memory_bandwidth),
            random_bandwidth=values.nbytes / drawn_seconds,
        )
    finally:
        torch.set_num_threads(num_threads)


def _matrix_flops(dtype: torch.dtype, size: int) -> float:
    """flop/s of a square matrix product."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return float(2 * size**3) / _best_seconds(lambda: left @ right, repeats=5)


def _copy_bandwidth() -> float:
    """Bytes read and written per second beyond the caches."""
    source = torch.ones(_BUFFER_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * _BUFFER_BYTES / _best_seconds(lambda: target.copy_(source), repeats=5)


def _linear_flops() -> float:
    """flop/s of a linear layer, forward and backward: three products of its size."""
    linear = nn.Linear(_WIDTH, 4 * _WIDTH)
    inputs = torch.randn(_ROWS, _WIDTH, requires_grad=True)
    gradient = torch.randn(_ROWS, 4 * _WIDTH)
    seconds = _best_seconds(lambda: linear(inputs).backward(gradient), repeats=8)
    return float(3 * 2 * _ROWS * _WIDTH * 4 * _WIDTH) / seconds


def _elementwise_bandwidth(values: torch.Tensor) -> float:
    """Bytes per second over one each of the kernels between matrix products."""
    kernels: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: values + values,
        lambda: nn.functional.gelu(values),
        lambda: nn.functional.layer_norm(values, values.shape[-1:]),
    )
    seconds = sum(_best_seconds(kernel, repeats=5) for kernel in kernels)
    return 2 * values.nbytes * len(kernels) / seconds


def _overhead_seconds() -> float:
    """Of one kernel on next to no data, called through modules, recorded and run backward.

    The kernels are counted as a profile counts them, so what modules, views and autograd cost
    besides is spread over them.
    """
    blocks = ((nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(_NUM_BLOCKS))
    model = nn.Sequential(*[module for block in blocks for module in block])
    inputs, gradient = torch.randn(4, 8, requires_grad=True), torch.ones(4, 8)

    def run() -> None:
        model(inputs).backward(gradient)

    counter = KernelCounter()
    with counter:
        run()
    num_kernels = sum(count.num_kernels for count in counter.counts)
    return _best_seconds(run, repeats=8) / num_kernels


def _best_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Shortest of some runs, the first one (which warms up) left out."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
