"""Frontiers for people and for other programs: a table, a plot, and SVG, HTML or CSV.

This module knows how points are shown. It does not know how they were found.
"""

import csv
import io
from collections.abc import Sequence
from html import escape

from rich.table import Table

from planner.explain.frontier import Point
from planner.report.explanation import placement_text
from planner.report.plain import plain_table
from planner.report.plot import Curve, plot_svg
from planner.report.quantities import bytes_text, seconds_text

__all__ = [
    "device_curve",
    "frontier_table",
    "frontiers_csv",
    "frontiers_html",
    "frontiers_svg",
    "memory_curve",
]


def frontier_table(title: str, points: Sequence[Point]) -> Table:
    """A row per point, in the order given."""
    table = plain_table(title, [], ["devices", "fullest rank", "step", "device time"])
    table.add_column("plan")
    for point in points:
        table.add_row(
            str(point.num_devices),
            bytes_text(point.peak_bytes),
            seconds_text(point.step_seconds),
            seconds_text(point.step_seconds * point.num_devices),
            placement_text(point.placement),
        )
    return table


def memory_curve(points: Sequence[Point]) -> Curve:
    """Step time over the fullest rank's memory."""
    return Curve(
        title="time and memory",
        x_label="memory of the fullest rank",
        y_label="step",
        points=[(float(point.peak_bytes), point.step_seconds) for point in points],
        x_text=bytes_text,
        y_text=seconds_text,
    )


def device_curve(points: Sequence[Point]) -> Curve:
    """Step time over the number of devices."""
    return Curve(
        title="time and devices",
        x_label="devices",
        y_label="step",
        points=[(float(point.num_devices), point.step_seconds) for point in points],
        x_text=lambda number: f"{number:.3g}",
        y_text=seconds_text,
    )


def frontiers_csv(memory: Sequence[Point], devices: Sequence[Point]) -> str:
    """Every figure, unrounded: a line per point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "frontier", "num_devices", "peak_bytes", "step_seconds", "num_replicas",
            "num_pipeline_ranks", "num_stages", "micro_batch_size", "num_micro_batches",
            "partition", "num_recomputed_stages", "offload_state", "offload_inputs",
        ]
    )  # fmt: skip
    for name, points in (("memory", memory), ("devices", devices)):
        for point in points:
            placement = point.placement
            writer.writerow(
                [
                    name, point.num_devices, point.peak_bytes, point.step_seconds,
                    placement.num_replicas, placement.num_pipeline_ranks, placement.num_stages,
                    placement.micro_batch_size, placement.num_micro_batches, placement.partition,
                    sum(placement.recompute), placement.offload_state, placement.offload_inputs,
                ]
            )  # fmt: skip
    return text.getvalue()


def frontiers_svg(memory: Sequence[Point], devices: Sequence[Point]) -> str:
    """Both plots, one below the other."""
    made = ((memory_curve, memory), (device_curve, devices))
    return plot_svg([make(points) for make, points in made if points])


def frontiers_html(model_name: str, memory: Sequence[Point], devices: Sequence[Point]) -> str:
    """Both plots and their points, in one file without scripts."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>Frontiers of {escape(model_name)}</title>',
        "<style>body{font-family:sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:.2em .8em;text-align:right}td:last-child{text-align:left}</style>",
        f"<h1>Frontiers of {escape(model_name)}</h1>",
    ]
    for make, points in ((memory_curve, memory), (device_curve, devices)):
        if not points:
            continue
        parts.append(plot_svg([make(points)]))
        parts.append("<table><tr><th>devices<th>fullest rank<th>step<th>plan</tr>")
        parts += [
            f"<tr><td>{point.num_devices}<td>{bytes_text(point.peak_bytes)}"
            f"<td>{seconds_text(point.step_seconds)}<td>{escape(placement_text(point.placement))}"
            "</tr>"
            for point in points
        ]
        parts.append("</table>")
    return "\n".join([*parts, "</html>", ""])
