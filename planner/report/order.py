"""The search for an order of compute as a table for the terminal.

This module knows what is worth a column. It computes nothing.
"""

from rich.table import Table

from planner.order import OrderFound
from planner.report.plain import plain_table
from planner.report.quantities import bytes_text, seconds_text

__all__ = ["order_line", "order_table"]


def order_line(found: OrderFound) -> str:
    """The best order, and how much better any other could be."""
    words = (
        f"order     {found.best.name}: {seconds_text(found.step_seconds)}, bound of this placement "
    )
    words += seconds_text(found.bound_seconds)
    if found.gap is None:
        return f"{words} for orders that do not halve backward"
    return f"{words}, gap {found.gap:.2%}"


def order_table(found: OrderFound) -> Table:
    """A row per order that was simulated, the fastest first."""
    title = "orders of compute for this placement"
    table = plain_table(title, ["order"], ["step", "against the best", "memory"])
    table.add_column("")
    for tried in found.tried:
        step = tried.simulation.step_seconds
        table.add_row(
            tried.name,
            seconds_text(step),
            f"{step / found.step_seconds:.3f}",
            bytes_text(max(tried.simulation.peak_bytes)),
            "" if tried.fits else f"{bytes_text(max(tried.excess_bytes))} too much",
        )
    return table
