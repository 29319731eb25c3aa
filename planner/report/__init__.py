"""Plans and timelines for people: tables, text timelines, files for other viewers."""

from planner.report.explanation import (
    better_lines,
    bottleneck_lines,
    families_table,
    nothing_fits_lines,
    offers_table,
    sides_table,
)
from planner.report.frontiers import (
    device_curve,
    frontier_table,
    frontiers_csv,
    frontiers_html,
    frontiers_svg,
    memory_curve,
)
from planner.report.measured import measured_table
from planner.report.plot import plot_text
from planner.report.quantities import bytes_text, count_text, parse_bytes, seconds_text
from planner.report.tables import (
    candidate_table,
    memory_table,
    placement_table,
    plan_lines,
    program_counts,
    rules_table,
    solution_lines,
)
from planner.report.timeline import timeline_rows

__all__ = [
    "better_lines",
    "bottleneck_lines",
    "bytes_text",
    "candidate_table",
    "count_text",
    "device_curve",
    "families_table",
    "frontier_table",
    "frontiers_csv",
    "frontiers_html",
    "frontiers_svg",
    "measured_table",
    "memory_curve",
    "memory_table",
    "nothing_fits_lines",
    "offers_table",
    "parse_bytes",
    "placement_table",
    "plan_lines",
    "plot_text",
    "program_counts",
    "rules_table",
    "seconds_text",
    "sides_table",
    "solution_lines",
    "timeline_rows",
]
