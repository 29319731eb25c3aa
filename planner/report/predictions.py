"""Predictions as tables for the terminal, and as CSV.

This module knows what is worth a column. It does not print, and it predicts nothing.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import fields

from rich.table import Table

from planner.predict import Breakdown, Configuration, Predicted
from planner.report.plain import plain_table
from planner.report.quantities import bytes_text, seconds_text
from planner.simulate.types import MemoryByClass

__all__ = [
    "breakdown_table",
    "comparison_table",
    "configuration_lines",
    "device_memory_table",
    "predictions_csv",
]


def configuration_lines(found: Predicted) -> list[str]:
    """Mesh, batch and step, a line each."""
    choice = found.configuration
    return [
        f"mesh      {choice.num_replicas} replicas x {choice.num_pipeline_ranks} pipeline ranks x "
        f"tensor degree {choice.tensor_degree}; {choice.schedule.value}, "
        f"{choice.stages_per_rank} stages per rank, partition {choice.partition}, "
        f"{'with' if choice.recompute else 'no'} recompute",
        f"batch     {choice.global_batch_size} samples = {choice.num_replicas} replicas x "
        f"{choice.num_micro_batches} micro-batches x {choice.micro_batch_size} samples",
        f"step      {seconds_text(found.step_seconds)}",
    ]


def breakdown_table(found: Predicted) -> Table:
    """A row per part of a step."""
    table = plain_table(None, ["of a step, mean over ranks"], ["seconds", "share"])
    for field in fields(Breakdown):
        seconds = getattr(found.breakdown, field.name)
        name = field.name.removesuffix("_seconds")
        table.add_row(name, seconds_text(seconds), f"{seconds / found.step_seconds:.1%}")
    return table


def device_memory_table(found: Predicted) -> Table:
    """A row per pipeline rank: each of its devices at its worst moment, by class."""
    names = [field.name for field in fields(MemoryByClass)]
    heads = [name.replace("_", " ") for name in names]
    table = plain_table(None, ["memory per device, rank"], [*heads, "total", "of limit"])
    for rank, moment in enumerate(found.memory):
        parts = [bytes_text(getattr(moment, name)) for name in names]
        share = f"{moment.total_bytes / found.memory_limit_bytes:.1%}"
        table.add_row(str(rank), *parts, bytes_text(moment.total_bytes), share)
    return table


def comparison_table(predictions: Sequence[Predicted]) -> Table:
    """A row per prediction, in the order given; shares are of its own step."""
    table = plain_table(
        None,
        ["tensor", "pipeline", "replicas", "stages", "batch", "schedule", "recompute", "partition"],
        ["step", "compute", "tensor", "exposed", "idle", "memory"],
    )
    table.add_column("")
    for found in predictions:
        choice, parts, missing = found.configuration, found.breakdown, found.missing_bytes
        shares = (
            parts.compute_seconds + parts.update_seconds,
            parts.tensor_seconds,
            parts.exposed_seconds,
            parts.idle_seconds,
        )
        table.add_row(
            str(choice.tensor_degree),
            str(choice.num_pipeline_ranks),
            str(choice.num_replicas),
            str(choice.stages_per_rank * choice.num_pipeline_ranks),
            f"{choice.num_micro_batches} x {choice.micro_batch_size}",
            choice.schedule.value,
            "yes" if choice.recompute else "no",
            str(choice.partition),
            seconds_text(found.step_seconds),
            *(f"{seconds / found.step_seconds:.1%}" for seconds in shares),
            bytes_text(found.peak_bytes),
            f"OUT OF MEMORY by {bytes_text(missing)}" if missing else "",
        )
    return table


def predictions_csv(predictions: Sequence[Predicted]) -> str:
    """Every figure, unrounded: a line per prediction."""
    choice_names = [f.name for f in fields(Configuration) if f.name != "boundaries"]
    part_names = [f.name for f in fields(Breakdown)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [*choice_names, "global_batch_size", "step_seconds", *part_names, "peak_bytes",
         "memory_limit_bytes", "missing_bytes"]
    )  # fmt: skip
    for found in predictions:
        choice = found.configuration
        writer.writerow(
            [
                *(getattr(choice, name) for name in choice_names),
                choice.global_batch_size,
                found.step_seconds,
                *(getattr(found.breakdown, name) for name in part_names),
                found.peak_bytes,
                found.memory_limit_bytes,
                found.missing_bytes,
            ]
        )
    return text.getvalue()
