"""The plan file: YAML sections, each with a checksum, and one text program per pipeline rank.

A truncated, corrupted or edited file is refused, and the section is named. Reading never runs
anything: values are validated against the plan's types, and code goes through `planner.plan.code`.
This module knows the file's form. It does not know whether the plan keeps the rules: that is
`planner.check`.
"""

import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from planner.errors import PlanFileError
from planner.files import write_whole
from planner.plan.sections import (
    HINT,
    Row,
    Section,
    load_sections,
    print_sections,
    verified_sections,
)
from planner.plan.text import parse_code, parse_program, print_code, print_program
from planner.plan.types import FORMAT_VERSION, Plan
from planner.plan.validate import validate_references
from planner.precision import Precision

__all__ = ["MAX_PLAN_BYTES", "parse_plan", "print_plan", "read_plan", "write_plan"]

MAX_PLAN_BYTES = 200_000_000
"""A plan of a million instructions takes half of it."""
_MAX_INSTRUCTIONS = 1_750_000
_MAX_OTHER_BYTES = 20_000_000
"""Of all sections but the programs: a plan of a thousand stages has a few megabytes."""
# In a tuple, because pydantic takes the configuration of a bare dataclass from that class alone.
_PLAN: TypeAdapter[tuple[Plan]] = TypeAdapter(
    tuple[Plan], config=ConfigDict(extra="forbid", strict=True)
)
_ROW_SECTIONS = ("batch", "tensors", "parameters", "units")
_PROGRAMS = ("programs", "evaluation")


def print_plan(plan: Plan) -> str:
    """The plan as text; `parse_plan(print_plan(plan)) == plan`."""
    sections = _plain(asdict(replace(plan, stages=(), programs=(), evaluation=())))
    for name in _ROW_SECTIONS:
        sections[name] = [Row(_without_empty(row)) for row in sections[name]]
    if plan.options.precision is Precision.MODEL:
        del sections["options"]["precision"], sections["options"]["keep_float32"]
    if not plan.partition_group_size:
        del sections["partition_group_size"]
    sections["stages"] = [
        Section(_plain(asdict(replace(stage, code=()))) | {"code": print_code(stage.code)})
        for stage in plan.stages
    ]
    sections["buffers"] = [[Row(row) for row in rank] for rank in sections["buffers"]]
    for name in _PROGRAMS:
        sections[name] = [print_program(program) for program in getattr(plan, name)]
    return print_sections(FORMAT_VERSION, sections)


def parse_plan(text: str, *, source: str = "plan") -> Plan:
    """Read a plan back; `source` names it in messages.

    Raises:
        PlanFileError: the text is no plan, of another format version, changed since it was
            written, or inconsistent in itself.
    """
    return _parse(text.encode(errors="surrogatepass"), source)


def _parse(content: bytes, source: str) -> Plan:
    parts = verified_sections(content, FORMAT_VERSION, source)
    if sum(len(part) for name, part in parts.items() if name not in _PROGRAMS) > _MAX_OTHER_BYTES:
        raise PlanFileError(f"{source} has too much beside its programs", hint=HINT)
    sections = load_sections(parts, source)
    stages = _list_of(sections.get("stages"), dict, "stages", source)
    codes = _list_of([stage.pop("code", None) for stage in stages], str, "code", source)
    programs = {name: _list_of(sections.pop(name, None), str, name, source) for name in _PROGRAMS}
    num_lines = sum(text.count("\n") for texts in programs.values() for text in texts)
    if num_lines > _MAX_INSTRUCTIONS:
        raise PlanFileError(f"{source} has more lines than a plan may have", hint=HINT)
    sections |= dict.fromkeys(_PROGRAMS, ()) | {"stages": [s | {"code": ()} for s in stages]}
    try:
        # Through JSON, where pydantic's strict mode takes lists for tuples.
        (plan,) = _PLAN.validate_json(json.dumps([sections]))
    except (ValidationError, ValueError, TypeError) as error:
        raise PlanFileError(f"{source} does not validate: {_reason(error)}", hint=HINT) from None
    plan = replace(
        plan,
        stages=tuple(
            replace(stage, code=parse_code(code))
            for stage, code in zip(plan.stages, codes, strict=True)
        ),
        programs=tuple(map(parse_program, programs["programs"])),
        evaluation=tuple(map(parse_program, programs["evaluation"])),
    )
    validate_references(plan, source=source)
    return plan


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan file, whole or not at all.

    Raises:
        PlanFileError: the plan is too large or holds what is no text, or the file cannot be
            written.
    """
    path = Path(path)
    try:
        content = print_plan(plan).encode()
    except UnicodeEncodeError as error:
        raise PlanFileError(
            f"the plan cannot be written: it holds {error.object[:60]!r}, which is no Unicode text",
            hint="rename the layer, parameter or batch key",
        ) from None
    if len(content) > MAX_PLAN_BYTES:
        raise PlanFileError(
            f"the plan takes {len(content)} bytes, more than the {MAX_PLAN_BYTES} a file may have",
            hint="use fewer micro-batches, pipeline ranks or stages",
        )
    try:
        write_whole(path, content)
    except OSError as error:
        raise PlanFileError(
            f"cannot write {path}: {error.strerror}", hint="give another path with --output"
        ) from None


def read_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanFileError: it is missing, too large, or refused by `parse_plan`.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise PlanFileError(
                f"{path} is not a file", hint="give the .plan.yaml file that lga-plan wrote"
            )
        if size > MAX_PLAN_BYTES:
            raise PlanFileError(
                f"{path} has {size} bytes; a plan has at most {MAX_PLAN_BYTES}",
                hint="give the .plan.yaml file that lga-plan wrote",
            )
        content = path.read_bytes()
    except OSError as error:
        raise PlanFileError(
            f"cannot read {path}: {error.strerror}", hint="make a plan with lga-plan MODEL --gpus N"
        ) from None
    if b"\r" in content:  # line ends of another system
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return _parse(content, str(path))


def _list_of(value: Any, kind: type, name: str, source: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise PlanFileError(
            f"{source} does not validate: {name} is not a list of {kind.__name__}", hint=HINT
        )
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "plan"
        return f"{place}: {first['msg']} (found {str(first['input'])[:60]!r})"
    return str(error)[:200]


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a plan without mixed precision says nothing about it."""
    return {key: value for key, value in row.items() if key != "compute_dtype" or value}


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML gives back, and a line for each key."""
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, dict):
        return Section((_plain(key), _plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
