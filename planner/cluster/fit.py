"""Seconds of messages of several sizes -> latency and bandwidth.

Knows arithmetic only: what was sent, and over what, is the caller's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import expm1, log
from statistics import fmean

__all__ = ["AffineLaw", "fit_affine"]

_SURE = 0.1
"""Spreads below this make little difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineLaw:
    """latency + bytes / bandwidth, and how far the measured points are from it."""

    latency_seconds: float
    bandwidth: float
    """Bytes per second."""
    residual: float
    """Mean relative error over the points it was fitted to, weighted as in the fit: half and twice
    are both 1."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bandwidth


def fit_affine(
    points: Mapping[int, float], spreads: Mapping[int, float] | None = None
) -> AffineLaw:
    """The law nearest to the points (bytes -> seconds above 0) in relative error.

    `spreads` (bytes -> relative spread of its measurements) makes uncertain points count less: as
    1 / (10 % + spread).

    Least mean of |log(law / measured)|, so that a message of 4 bytes counts as much as one of
    16 MiB, and a point or two that noise, or the burst that a shaped link lets through, has put far
    off do not bend the law. As for all least absolute deviations, the best law goes through two
    points (nearly, as the logarithm is not linear), so all pairs are tried; and each point alone,
    without latency or without a cost per byte.

    Raises:
        ValueError: no point, or one of no seconds.
    """
    if not points or min(points.values()) <= 0:
        raise ValueError(f"no law of {dict(points)}: every message must take some time")
    largest = max(points)
    laws = [(0.0, seconds / size) for size, seconds in points.items()]
    # Hardly a cost per byte: what the largest message took is an upper bound of it.
    laws += [(seconds, 1e-3 * points[largest] / largest) for seconds in points.values()]
    for (size, seconds), (other_size, other_seconds) in combinations(points.items(), 2):
        per_byte = (other_seconds - seconds) / (other_size - size)
        latency = seconds - per_byte * size
        if latency >= 0 and per_byte > 0:
            laws.append((latency, per_byte))

    weights = [1 / (_SURE + (spreads or {}).get(size, 0.0)) for size in points]

    def distance(law: tuple[float, float]) -> float:
        latency, per_byte = law
        errors = (abs(log((latency + per_byte * n) / t)) for n, t in points.items())
        return fmean(errors, weights)

    latency, per_byte = best = min(laws, key=distance)
    return AffineLaw(
        latency_seconds=latency, bandwidth=1 / per_byte, residual=expm1(distance(best))
    )
