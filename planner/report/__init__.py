"""Plans and timelines for people: tables, text timelines, files for other viewers."""

from planner.report.measured import measured_table
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
    "bytes_text",
    "candidate_table",
    "count_text",
    "measured_table",
    "memory_table",
    "parse_bytes",
    "placement_table",
    "plan_lines",
    "program_counts",
    "rules_table",
    "seconds_text",
    "solution_lines",
    "timeline_rows",
]
