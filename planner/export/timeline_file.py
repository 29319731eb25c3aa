"""The timeline file: when each instruction of one plan ran, as JSON, a row for each.

A file belongs to one plan, which its digest names, and holds every instruction of it. This module
knows the file's form. It does not know how the times came about.
"""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from planner.errors import UsageError
from planner.files import read_text, write_text
from planner.plan.file import print_plan
from planner.plan.types import Plan, PlanOptions
from planner.timeline import Event, Timeline

__all__ = ["parse_timeline", "plan_digest", "print_timeline", "read_timeline", "write_timeline"]

_FORMAT = "lga timeline 1"
_MAX_BYTES = 512_000_000
_MAX_SECONDS = 1e9
_COLUMNS = [field.name for field in fields(Event)]
_row_of = attrgetter(*_COLUMNS)
_HINT = "give the file that lga-run --timeline wrote for this very plan"


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """The file as JSON has it."""

    format: str
    plan: str
    source: str
    columns: list[str]
    rows: list[list[float | int]]


_CONTENTS: TypeAdapter[tuple[_Contents]] = TypeAdapter(
    tuple[_Contents], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
)


def plan_digest(plan: Plan) -> str:
    """Names a plan by all that it says, but for its prediction and what a run may override."""
    same = replace(plan, prediction=None, options=PlanOptions())
    return hashlib.sha256(print_plan(same).encode()).hexdigest()[:16]


def print_timeline(plan: Plan, timeline: Timeline) -> str:
    """The timeline of the plan as text; `parse_timeline` reads it back unchanged."""
    head = {
        "format": _FORMAT,
        "plan": plan_digest(plan),
        "source": timeline.source,
        "columns": _COLUMNS,
    }
    rows = ",\n".join(json.dumps(_row_of(event)) for event in timeline.events)
    return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n'


def parse_timeline(text: str, plan: Plan, *, source: str = "timeline") -> Timeline:
    """Read a timeline of `plan` back; `source` names it in messages.

    Raises:
        UsageError: the text is no timeline, or one of another plan, or it is not complete.
    """
    try:
        # Through JSON, where pydantic's strict mode takes lists for tuples.
        (contents,) = _CONTENTS.validate_json(f"[{text}]")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the whole"
        raise UsageError(f"{source} is no timeline: {place}: {first['msg']}", hint=_HINT) from None
    if contents.format != _FORMAT or contents.columns != _COLUMNS:
        raise UsageError(
            f"{source} has the format {contents.format[:40]!r} with columns "
            f"{', '.join(contents.columns)[:80]}; this version reads {_FORMAT!r} with "
            f"{', '.join(_COLUMNS)}",
            hint=_HINT,
        )
    events = tuple(_event(row, number, source) for number, row in enumerate(contents.rows))
    timeline = Timeline(source=contents.source, events=events)
    _check_belongs(timeline, plan, source)
    if contents.plan != plan_digest(plan):
        raise UsageError(
            f"{source} is a timeline of another plan ({contents.plan[:40]}, and this one is "
            f"{plan_digest(plan)})",
            hint=_HINT,
        )
    return timeline


def write_timeline(plan: Plan, timeline: Timeline, path: str | Path) -> None:
    """Write the timeline of the plan, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    write_text(path, print_timeline(plan, timeline))


def read_timeline(path: str | Path, plan: Plan) -> Timeline:
    """Read a timeline file of `plan`.

    Raises:
        UsageError: it is missing, too large, not text, or refused by `parse_timeline`.
    """
    text = read_text(path, most_bytes=_MAX_BYTES, wanted="the file that lga-run --timeline wrote")
    return parse_timeline(text, plan, source=str(path))


def _event(row: list[Any], number: int, source: str) -> Event:
    if len(row) != len(_COLUMNS) or not all(isinstance(value, int) for value in row[:2]):
        raise UsageError(f"{source}: row {number} is no event: {row[:8]}", hint=_HINT)
    event = Event(**dict(zip(_COLUMNS, row, strict=True)))
    if not 0.0 <= event.start_seconds <= event.end_seconds <= _MAX_SECONDS:
        raise UsageError(
            f"{source}: row {number} starts at {event.start_seconds} s and ends at "
            f"{event.end_seconds} s",
            hint=_HINT,
        )
    return event


def _check_belongs(timeline: Timeline, plan: Plan, source: str) -> None:
    """Refuse a timeline that has not exactly one event for each instruction, in order."""
    found = [0] * plan.num_pipeline_ranks
    last_rank = 0
    for event in timeline.events:
        known = last_rank <= event.rank < plan.num_pipeline_ranks
        if not known or event.index != found[event.rank]:
            raise UsageError(
                f"{source} has no event, or two, before instruction {event.index} of pipeline "
                f"rank {event.rank}, or the plan has no such rank",
                hint=_HINT,
            )
        last_rank = event.rank
        found[event.rank] += 1
    for rank, program in enumerate(plan.programs):
        if found[rank] != len(program):
            raise UsageError(
                f"{source} has {found[rank]} events of pipeline rank {rank}, but the plan has "
                f"{len(program)} instructions there",
                hint=_HINT,
            )
