"""Fit a device's few parameters to measured step times: robust least squares of logarithms.

Knows the parameters, what is known of them beforehand and how to search. Does not know files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from planner.calibrate.rows import MOST_ROWS, MeasuredStep
from planner.calibrate.step import Machine, step_seconds
from planner.cluster.types import CollectiveAlgorithm, Device, Link, OperatorRates
from planner.cost import peak_flops
from planner.profile import OperatorClass

__all__ = ["PARAMETERS", "Fit", "Surroundings", "calibrate", "machine_of"]

_Vector = NDArray[np.float64]

PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        "compute_efficiency": "part of the peak that the largest products reach",
        "half_flop": "flop of a product that reaches half of that",
        "memory_efficiency": "part of the memory bandwidth that kernels reach",
        "launch_seconds": "host time to launch one kernel",
        "misaligned_efficiency": "part of their rate that products with odd rows reach",
        "latency_seconds": "of one round of a collective inside a host",
        "skew_seconds": "host time that each further member adds to an all-reduce",
        "ends_seconds": "batch, embedding and loss of one micro-batch",
        "step_seconds": "once per step",
    }
)
"""What is fitted, and what each means."""
_USUAL = {
    "misaligned_efficiency": 0.6,
    "launch_seconds": 4e-5,
    "latency_seconds": 4e-5,
    "skew_seconds": 2e-5,
    "ends_seconds": 5e-3,
    "step_seconds": 2e-3,
}
"""Where no row says otherwise: Megatron under Python on an A100, in round numbers."""
_USUAL_PRODUCT_SECONDS = 5e-5
"""Of a product too small to fill the device: half_flop at the device's rate."""
_PRIOR_SPREAD = 0.3
"""Standard deviation of a parameter's logarithm around what is known of it beforehand."""
_ROW_SPREAD = 0.06
"""Standard deviation of a row's logarithm around the model, which weighs rows against the prior."""
_HUBER = 0.1
"""Rows farther off than this pull with a constant force, so that one bad row cannot rule."""
_STEP = 0.02
"""Of a logarithm, for the differences that stand for derivatives."""
_LONGEST_MOVE = 0.7
_MOST_ROUNDS = 40
_SMALL_GAIN = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is known before the fit: data sheets."""

    device: Device
    num_host_devices: int
    link: Link
    """Its latency is fitted."""
    network: Link
    collectives: CollectiveAlgorithm = "tree"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A machine fitted to rows."""

    values: Mapping[str, float]
    """Of `PARAMETERS`."""
    machine: Machine
    rows: tuple[MeasuredStep, ...]
    """That it was fitted to."""

    @property
    def mean_error(self) -> float:
        """Mean of |predicted / measured - 1| over its own rows."""
        errors = [abs(step_seconds(row, self.machine) * 1e3 / row.step_ms - 1) for row in self.rows]
        return sum(errors) / len(errors)


def machine_of(values: Mapping[str, float], known: Surroundings) -> Machine:
    """The machine with these `PARAMETERS`.

    Products have the fitted rate, which depends on their size; the efficiency of memory holds for
    every class of operators.
    """
    compute = min(values["compute_efficiency"], 1.0)
    memory = min(values["memory_efficiency"], 1.0)
    product = OperatorRates(
        compute_efficiency=compute, memory_efficiency=memory, half_flop=values["half_flop"]
    )
    return Machine(
        device=replace(
            known.device,
            compute_efficiency=compute,
            memory_efficiency=memory,
            rates={OperatorClass.PRODUCT: product, OperatorClass.CONVOLUTION: product},
            launch_seconds=values["launch_seconds"],
        ),
        num_host_devices=known.num_host_devices,
        link=replace(known.link, latency_seconds=values["latency_seconds"]),
        network=known.network,
        collectives=known.collectives,
        skew_seconds=values["skew_seconds"],
        misaligned_efficiency=min(values["misaligned_efficiency"], 1.0),
        ends_seconds=values["ends_seconds"],
        step_seconds=values["step_seconds"],
    )


def calibrate(rows: Sequence[MeasuredStep], known: Surroundings) -> Fit:
    """Fit `PARAMETERS` to at most `MOST_ROWS` measured steps.

    Minimises Huber's loss (Annals of Mathematical Statistics 35, 1964) of log(predicted /
    measured) plus the squared distance of each parameter's logarithm from what is usual, by
    Levenberg and Marquardt's method (SIAM Journal 11, 1963): parameters that no row speaks of
    stay where they were.

    Raises:
        ValueError: no rows, or more than MOST_ROWS.
    """
    if not 0 < len(rows) <= MOST_ROWS:
        raise ValueError(f"a calibration takes 1 to {MOST_ROWS} rows, not {len(rows)}")
    start = np.log([_prior(known)[name] for name in PARAMETERS])
    logs = np.log([row.step_ms * 1e-3 for row in rows])

    def residuals(point: _Vector) -> _Vector:
        machine = machine_of(_values(point), known)
        predicted = np.log([step_seconds(row, machine) for row in rows])
        return (predicted - logs) / _ROW_SPREAD

    point = _minimum(residuals, start)
    values = _values(point)
    return Fit(values=values, machine=machine_of(values, known), rows=tuple(rows))


def _prior(known: Surroundings) -> dict[str, float]:
    device = known.device
    rate = peak_flops(device, "float16") * device.compute_efficiency
    return {
        **_USUAL,
        "compute_efficiency": device.compute_efficiency,
        "memory_efficiency": device.memory_efficiency,
        "half_flop": _USUAL_PRODUCT_SECONDS * rate,
    }


def _values(point: _Vector) -> dict[str, float]:
    return {name: math.exp(log) for name, log in zip(PARAMETERS, point.tolist(), strict=True)}


def _minimum(residuals: Callable[[_Vector], _Vector], start: _Vector) -> _Vector:
    """Levenberg and Marquardt, with the prior as further residuals and weights for Huber's loss."""
    limit = _HUBER / _ROW_SPREAD

    def loss(point: _Vector, errors: _Vector) -> float:
        sizes = np.abs(errors)
        huber = np.where(sizes <= limit, errors**2 / 2, limit * (sizes - limit / 2))
        return float(huber.sum() + (((point - start) / _PRIOR_SPREAD) ** 2).sum() / 2)

    point, errors = start, residuals(start)
    best, damping = loss(start, errors), 1e-2
    for _ in range(_MOST_ROUNDS):
        weights = np.minimum(1.0, limit / np.maximum(np.abs(errors), 1e-12))
        slopes = np.stack(
            [(residuals(point + _STEP * unit) - errors) / _STEP for unit in np.eye(len(point))],
            axis=1,
        )
        normal = slopes.T @ (slopes * weights[:, None]) + np.eye(len(point)) / _PRIOR_SPREAD**2
        force = slopes.T @ (errors * weights) + (point - start) / _PRIOR_SPREAD**2
        before = best
        while damping < 1e8:
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -force)
            there = point + np.clip(move, -_LONGEST_MOVE, _LONGEST_MOVE)
            there_errors = residuals(there)
            there_loss = loss(there, there_errors)
            if there_loss < best:
                point, errors, best = there, there_errors, there_loss
                damping /= 5
                break
            damping *= 5
        if before - best < _SMALL_GAIN * before:
            break
    return point
