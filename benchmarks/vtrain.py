"""Predicted against measured steps of GPT models on A100s: `python benchmarks/vtrain.py`.

Reads vTrain's public tables (github.com/VIA-Research/vTrain, MIT: Megatron-DeepSpeed, hosts of 8
A100s, 800 Gb/s between them) from the folder `vtrain` in LGA_DATA, or CSV files given as arguments.
Fits the packaged A100 to a few rows, which are chosen by what was run alone, and predicts the rest.
`--rounds` repeats it with other rows, drawn at random, and with whole groups of equal work (gpus,
global_batch, hidden, layers) kept from the fit, a fifth of them at a time.
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
from rich.console import Console
from rich.table import Table

from planner.calibrate import (
    MOST_ROWS,
    PARAMETERS,
    MeasuredStep,
    Surroundings,
    calibrate,
    choose_rows,
    read_steps,
    step_seconds,
)
from planner.calibrate.known import start

__all__ = ["Scores", "group_folds", "held_out", "known_machine", "main", "predict", "score"]

_NETWORK = "ib-edr-100"
"""One of 100 Gb/s for each of a host's 8 devices."""
_NUM_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Mean of |predicted / measured - 1| over rows that were not fitted, by kind of rows."""

    tensor_1: float
    all_rows: float
    single_host: float
    multi_host: float
    regret: float
    """Measured seconds of the row predicted best over those of the row measured best, less 1: mean
    over groups of equal work of two rows or more."""

    def percents(self) -> list[str]:
        values = (self.tensor_1, self.all_rows, self.single_host, self.multi_host, self.regret)
        return [f"{value:.2%}" for value in values]


def known_machine() -> Surroundings:
    """What is known of the machines before any row is read."""
    return start("a100-80", _NETWORK).known


def predict(
    rows: Sequence[MeasuredStep], fitted: Sequence[int], judged: Sequence[int]
) -> tuple[dict[int, float], dict[str, float]]:
    """Fit to rows `fitted`: milliseconds of each row of `judged`, and the fitted parameters."""
    fit = calibrate([rows[index] for index in fitted], known_machine())
    predicted = {index: step_seconds(rows[index], fit.machine) * 1e3 for index in judged}
    return predicted, dict(fit.values)


def score(
    rows: Sequence[MeasuredStep], predicted: dict[int, float], fitted: Sequence[int]
) -> Scores:
    """Errors of the rows that were not fitted; regret of all that were predicted."""
    taken = set(fitted)

    def mean_error(keep: Callable[[MeasuredStep], bool]) -> float:
        errors = [
            abs(milliseconds / rows[index].step_ms - 1)
            for index, milliseconds in predicted.items()
            if index not in taken and keep(rows[index])
        ]
        return fmean(errors) if errors else 0.0

    groups = [group for group in _groups(rows, predicted).values() if len(group) > 1]
    regrets = [
        rows[min(group, key=lambda index: predicted[index])].step_ms
        / min(rows[index].step_ms for index in group)
        - 1
        for group in groups
    ]
    return Scores(
        tensor_1=mean_error(lambda row: row.tensor == 1),
        all_rows=mean_error(lambda row: row.gpus > 0),
        single_host=mean_error(lambda row: row.gpus <= 8),
        multi_host=mean_error(lambda row: row.gpus > 8),
        regret=fmean(regrets) if regrets else 0.0,
    )


def _groups(rows: Sequence[MeasuredStep], judged: Iterable[int]) -> dict[object, list[int]]:
    groups: dict[object, list[int]] = {}
    for index in judged:
        row = rows[index]
        key = (row.gpus, row.global_batch, row.hidden, row.layers)
        groups.setdefault(key, []).append(index)
    return groups


def group_folds(rows: Sequence[MeasuredStep], seed: int) -> list[list[int]]:
    """Rows in five parts that share no group of equal work."""
    groups = list(_groups(rows, range(len(rows))).values())
    random.Random(seed).shuffle(groups)
    return [
        [index for group in groups[first::_NUM_FOLDS] for index in group]
        for first in range(_NUM_FOLDS)
    ]


def _mean(scores: Sequence[Scores]) -> Scores:
    names = Scores.__dataclass_fields__
    return Scores(**{name: fmean(getattr(score, name) for score in scores) for name in names})


def _worst(scores: Sequence[Scores]) -> Scores:
    names = Scores.__dataclass_fields__
    return Scores(**{name: max(getattr(score, name) for score in scores) for name in names})


def _random_rounds(rows: Sequence[MeasuredStep], number: int, rounds: int) -> list[Scores]:
    found = []
    for seed in range(1, rounds + 1):
        fitted = random.Random(seed).sample(range(len(rows)), min(number, len(rows)))
        predicted, _ = predict(rows, fitted, range(len(rows)))
        found.append(score(rows, predicted, fitted))
    return found


def held_out(rows: Sequence[MeasuredStep], number: int, seed: int) -> Scores:
    """Every row predicted from `number` rows chosen among those of other groups."""
    predicted: dict[int, float] = {}
    for fold in group_folds(rows, seed):
        others = sorted(set(range(len(rows))) - set(fold))
        chosen = choose_rows([rows[index] for index in others], number)
        predicted |= predict(rows, [others[index] for index in chosen], fold)[0]
    return score(rows, predicted, ())


@click.command()
@click.argument("tables", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--fit-rows", type=click.IntRange(1, MOST_ROWS), default=MOST_ROWS, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of rows.")
@click.option("--rounds", type=click.IntRange(0), default=10, show_default=True)
def main(tables: tuple[Path, ...], fit_rows: int, seed: int, rounds: int) -> None:
    """Print the chosen rows, the fitted parameters, errors, regret, and other choices of rows."""
    if not tables:
        if "LGA_DATA" not in os.environ:
            raise click.UsageError("name CSV files, or set LGA_DATA to the folder of public data")
        folder = Path(os.environ["LGA_DATA"]) / "vtrain"
        tables = (folder / "single_host.csv", folder / "multi_host.csv")
    rows = [row for table in tables for row in read_steps(table)]
    console = Console()
    chosen = choose_rows(rows, fit_rows, seed)
    predicted, values = predict(rows, chosen, range(len(rows)))
    console.print(_rows_table(rows, chosen))
    console.print(_parameters_table(values))
    table = Table(title=f"{len(rows) - len(chosen)} rows predicted from {len(chosen)}")
    columns = ("rows fitted to", "T = 1", "all", "single host", "multi host", "regret")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    table.add_row("chosen", *score(rows, predicted, chosen).percents())
    if rounds:
        drawn = _random_rounds(rows, fit_rows, rounds)
        apart = [held_out(rows, fit_rows, seed) for seed in range(1, rounds + 1)]
        for name, found in (("drawn", drawn), ("groups held out", apart)):
            table.add_row(f"{name}: mean of {rounds}", *_mean(found).percents())
            table.add_row(f"{name}: worst of {rounds}", *_worst(found).percents())
    console.print(table)


def _rows_table(rows: Sequence[MeasuredStep], chosen: Sequence[int]) -> Table:
    names = list(MeasuredStep.__dataclass_fields__)
    table = Table(title="rows fitted to")
    for name in ("row", *names):
        table.add_column(name.replace("_", " "), justify="right")
    for index in chosen:
        table.add_row(str(index + 1), *(f"{getattr(rows[index], name):g}" for name in names))
    return table


def _parameters_table(values: dict[str, float]) -> Table:
    table = Table("parameter", "value", "meaning", title="fitted")
    for name, meaning in PARAMETERS.items():
        table.add_row(name, f"{values[name]:.4g}", meaning)
    return table


if __name__ == "__main__":
    main()
