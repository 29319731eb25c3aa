"""Measured layers as a table for the terminal.

This module knows rich's tables. It does not know how anything was measured.
"""

import math

from rich.table import Table

from planner.measure.measured import MeasuredLayer, MeasuredModel, MeasuredSize
from planner.report.quantities import bytes_text, seconds_text

__all__ = ["layer_lines", "layer_table"]

_PARTS = ("forward", "backward", "recompute", "update")


def layer_lines(measured: MeasuredModel) -> list[str]:
    """Model, device and versions, a line each."""
    device, versions = measured.device, measured.versions
    threads = (
        f", {device.num_threads} of {device.num_cores} threads" if device.kind == "cpu" else ""
    )
    cuda = f", CUDA {versions.cuda}" if device.kind == "cuda" else ""
    return [
        f"model     {measured.model_name}",
        f"device    {device.name}{threads}; torch {versions.torch}{cuda}",
        f"measured  {measured.date}, {measured.num_repeats} runs of each layer; updates with "
        f"{measured.optimizer}",
    ]


def layer_table(size: MeasuredSize) -> Table:
    """A row per distinct layer, and their sum over all layers of the model."""
    table = Table(title=f"layers, micro-batches of {size.micro_batch_size}")
    table.add_column("layer", overflow="fold")
    for column in (*_PARTS, "spread", "peak", "counted", "optimizer"):
        table.add_column(column, justify="right")
    for layer in size.layers:
        others = f" and {len(layer.layers) - 1} more" if len(layer.layers) > 1 else ""
        table.add_row(
            layer.layers[0] + others,
            *(seconds_text(getattr(layer, part).median) for part in _PARTS),
            f"{_spread(layer):.0%}",
            bytes_text(layer.peak_bytes),
            bytes_text(layer.counted_peak_bytes),
            bytes_text(layer.optimizer_bytes),
        )
    table.add_section()
    sums = (
        math.fsum(getattr(layer, part).median * len(layer.layers) for layer in size.layers)
        for part in _PARTS
    )
    table.add_row("all layers", *map(seconds_text, sums), *[""] * 4)
    return table


def _spread(layer: MeasuredLayer) -> float:
    """Of forward and backward together, relative to their medians."""
    spread = layer.forward.spread + layer.backward.spread
    return spread / (layer.forward.median + layer.backward.median)
