"""Time on a device: CUDA events on a GPU, a monotonic clock on a CPU; medians and spreads.

It knows moments and durations. It does not know what is timed.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Clock", "Seconds", "seconds_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """A duration that was measured several times."""

    median: float
    spread: float
    """Interquartile range; 0 of a single measurement."""


class Clock:
    """Marks moments in the order in which the device reaches them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device

    def mark(self) -> Any:
        """This moment, for `seconds_between`."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has reached every mark."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)

    def seconds_between(self, first: Any, second: Any) -> float:
        """After `wait`."""
        if not self._is_cuda:
            return float(second - first)
        return float(first.elapsed_time(second)) * 1e-3


def seconds_of(samples: Sequence[float]) -> Seconds:
    """Median and interquartile range of at least one sample."""
    spread = 0.0
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = high - low
    return Seconds(median=statistics.median(samples), spread=spread)
