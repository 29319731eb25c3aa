"""Calibration: a device's few parameters from at most 20 measured training steps."""

from planner.calibrate.fit import PARAMETERS, Fit, Surroundings, calibrate, machine_of
from planner.calibrate.rows import COLUMNS, MOST_ROWS, MeasuredStep, choose_rows, read_steps
from planner.calibrate.step import Machine, one_forward_one_backward_seconds, step_seconds

__all__ = [
    "COLUMNS",
    "MOST_ROWS",
    "PARAMETERS",
    "Fit",
    "Machine",
    "MeasuredStep",
    "Surroundings",
    "calibrate",
    "choose_rows",
    "machine_of",
    "one_forward_one_backward_seconds",
    "read_steps",
    "step_seconds",
]
