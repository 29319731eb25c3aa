"""Measured step times: a CSV file -> rows, and which of them to calibrate on.

Knows the columns and what they mean. Does not know devices nor how a step is predicted.
"""

import csv
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.calibrate.gpt import GptShape
from planner.errors import UsageError

__all__ = ["COLUMNS", "MOST_ROWS", "MeasuredStep", "choose_rows", "read_steps"]

MOST_ROWS = 20
"""A calibration takes no more: what it says of other rows then means something."""
COLUMNS = {
    "gpus": "devices in all: tensor x data x pipeline",
    "global_batch": "sequences per step",
    "micro_batch_size": "sequences per micro-batch",
    "hidden": "width of the model",
    "heads": "attention heads",
    "layers": "transformer layers",
    "sequence": "tokens per sequence",
    "tensor": "degree of tensor parallelism",
    "data": "replicas",
    "pipeline": "pipeline stages, scheduled 1F1B",
    "step_ms": "measured milliseconds of a whole step",
}
"""Column -> its meaning. Others are ignored, in any order."""
_CORRECT = "correct it"
_MOST_LINES = 5000
"""Choosing among them grows with their square."""
_MOST_BYTES = 10_000_000
_MOST = 1 << 24
"""Of any whole number in a row; beyond it is a slip."""
_MOST_GPUS = 1 << 13
"""As many as a cluster can have."""
_STEP_MS = 1e-3, 1e9
"""A microsecond to twelve days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One training step of a GPT model under full recompute and 1F1B, as it was measured."""

    gpus: int
    global_batch: int
    micro_batch_size: int
    hidden: int
    heads: int
    layers: int
    sequence: int
    tensor: int
    data: int
    pipeline: int
    step_ms: float

    @property
    def num_micro_batches(self) -> int:
        """Per replica."""
        return self.global_batch // (self.data * self.micro_batch_size)

    @property
    def shape(self) -> GptShape:
        return GptShape(
            hidden=self.hidden,
            heads=self.heads,
            sequence=self.sequence,
            micro_batch_size=self.micro_batch_size,
            tensor=self.tensor,
        )


def read_steps(path: Path) -> list[MeasuredStep]:
    """The rows of a CSV file with a header line that names at least `COLUMNS`.

    Raises:
        UsageError: the file cannot be read, has no rows, lacks a column, or a row holds something
            that is no positive number or does not fit together.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        names = list(reader.fieldnames or ())
        rows = [(row, reader.line_num) for row in reader]
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num}: {error}", hint="give a CSV file"
        ) from None
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UsageError(
            f"{path}: the first line has no column {', '.join(missing)}",
            hint=f"name the columns {', '.join(COLUMNS)} in the first line",
        )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"{path}: the first line has column {', '.join(twice)} twice", hint="remove one of them"
        )
    if not 0 < len(rows) <= _MOST_LINES:
        raise UsageError(
            f"{path} holds {len(rows) or 'no'} measured step{'s' if len(rows) > 1 else ''}",
            hint=f"give a line for each, at most {_MOST_LINES}",
        )
    return [_step(row, f"{path}, line {line}") for row, line in rows]


def _text(path: Path) -> str:
    if not path.exists():
        raise UsageError(f"{path} does not exist", hint="check the path")
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="give a CSV file")
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise UsageError(
                f"{path} has {size} bytes, more than {_MOST_BYTES}", hint="leave lines out"
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="give a CSV file") from None


def _step(row: dict[str, str | None], where: str) -> MeasuredStep:
    whole = {
        name: int(_number(row[name], name, where, whole=True))
        for name in COLUMNS
        if name != "step_ms"
    }
    step = MeasuredStep(**whole, step_ms=_number(row["step_ms"], "step_ms", where, whole=False))
    product = step.tensor * step.data * step.pipeline
    if product != step.gpus:
        raise UsageError(
            f"{where}: tensor x data x pipeline is {product}, but gpus is {step.gpus}",
            hint="correct one of them",
        )
    for number, divisor, words in (
        (step.global_batch, step.data * step.micro_batch_size, "data x micro_batch_size"),
        (step.hidden, step.heads, "heads"),
        (step.heads, step.tensor, "tensor"),
    ):
        if number % divisor:
            raise UsageError(
                f"{where}: {words} = {divisor} does not divide {number}", hint="correct the line"
            )
    if step.layers < step.pipeline:
        raise UsageError(
            f"{where}: {step.layers} layers on {step.pipeline} pipeline stages",
            hint="every stage needs a layer",
        )
    return step


def _number(text: str | None, name: str, where: str, *, whole: bool) -> float:
    least, most = (1, _MOST_GPUS if name == "gpus" else _MOST) if whole else _STEP_MS
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf) or (whole and number != int(number)):
        expected = "a whole number above 0" if whole else "a number above 0"
        raise UsageError(f"{where}: {name} = {text or ''!r:.60} is not {expected}", hint=_CORRECT)
    if not least <= number <= most:
        raise UsageError(
            f"{where}: {name} = {text!r:.60} is not between {least:g} and {most:g}", hint=_CORRECT
        )
    return number


def choose_rows(steps: Sequence[MeasuredStep], number: int, seed: int = 0) -> list[int]:
    """Indices of rows that stand for all: measured times play no part.

    Each row taken is the one that brings all rows nearest to the rows taken, summed over them
    (Cornuejols, Fisher and Nemhauser, "Location of bank accounts to optimize float", Management
    Science 23(8), 1977). Distances are between the logarithms of what decides a step, so that a
    factor counts alike everywhere. The first row is the one in the middle; a `seed` other than 0
    draws another one.
    """
    points = np.array([_features(step) for step in steps])

    def distances(index: int) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.sqrt(((points - points[index]) ** 2).sum(axis=1))
        return result

    if seed:
        chosen = [random.Random(seed).randrange(len(points))]
    else:
        chosen = [min(range(len(points)), key=lambda index: float(distances(index).sum()))]
    nearest = distances(chosen[0])
    while len(chosen) < min(number, len(points)):
        others = [index for index in range(len(points)) if index not in chosen]
        best = min(others, key=lambda i: float(np.minimum(nearest, distances(i)).sum()))
        chosen.append(best)
        nearest = np.minimum(nearest, distances(best))
    return sorted(chosen)


def _features(step: MeasuredStep) -> tuple[float, ...]:
    """Logarithms; half weight to replicas and to how often the same micro-batch is repeated."""
    return (
        math.log2(step.hidden),
        math.log2(step.layers),
        math.log2(step.sequence),
        math.log2(step.tensor),
        math.log2(step.micro_batch_size),
        math.log2(step.pipeline),
        math.log2(step.data) / 2,
        math.log2(step.num_micro_batches) / 2,
    )
