"""Reads YAML safely and validates it; every failure names the file, the key and the value.

Knows YAML and pydantic's errors. Does not know what the content means.
"""

import difflib
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from planner.cluster.schema import ClusterFile
from planner.errors import ClusterError

__all__ = ["did_you_mean", "read_text", "validate"]

Model = TypeVar("Model", bound=BaseModel)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60

_TAGS = {"name", "inline"}  # pydantic adds the kind of a union's branch to a location


class _Loader(yaml.SafeLoader):
    """Plain data only; no key twice; `25e9` is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice in one mapping",
                    problem_mark=node.start_mark,
                )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+"),
    list("-+0123456789"),
)


def read_text(path: Path) -> str:
    """Content of a user's file.

    Raises:
        ClusterError: there is no such file, or it is not readable UTF-8 text.
    """
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise OSError("it is no regular file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClusterError(
            f"cluster file {str(path)!r} does not exist",
            hint="check the path, or name a known device such as a100-80",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"cluster file {str(path)!r} cannot be read: {error}",
            hint="give a readable text file in UTF-8",
        ) from None


def validate(model: type[Model], text: str, file: str) -> Model:
    """Parse `text` as YAML and validate it; `file` is named in errors.

    Raises:
        ClusterError: it is not YAML of plain data, or breaks the schema.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ClusterError(
            f"{file}{line}: not YAML of plain data: {error.problem}",
            hint="use mappings, lists, numbers and strings only, and each key once",
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{file}: not YAML of plain data: {error}", hint="check the file's syntax"
        ) from None
    if not isinstance(data, dict):
        raise ClusterError(
            f"{file}: the file holds {_short.repr(data)}, not a mapping of keys to values",
            hint="begin with `name:`, `hosts:` and `network:`",
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(error, file) from None


def _explain(error: ValidationError, file: str) -> ClusterError:
    # A misspelt key is both unknown and missing: the unknown one says more.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    parts = [str(part) for part in first["loc"] if part not in _TAGS]
    key = ".".join(parts) or "the file"
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(parts[-1], sorted(_keys(ClusterFile))) or "remove it"
        return ClusterError(f"{file}: unknown key {key} = {_short.repr(first['input'])}", hint=hint)
    if first["type"] == "missing":
        return ClusterError(f"{file}: key {key} is missing", hint=f"add {parts[-1]}")
    return ClusterError(
        f"{file}: {key} = {_short.repr(first['input'])}: {first['msg']}",
        hint=f"correct {key}; units are bytes, seconds, bytes/s and flop/s, as in 25e9",
    )


def _keys(model: type[BaseModel]) -> set[str]:
    """All keys of a model's schema, those of nested models included."""
    schema = model.model_json_schema()
    nested = schema.get("$defs", {}).values()
    return {key for part in (schema, *nested) for key in part.get("properties", {})}


def did_you_mean(name: str, known: list[str]) -> str:
    """`did you mean a100-80?` for known names that contain or resemble `name`, or nothing."""
    close = [other for other in known if name.lower() in other] if len(name) >= 3 else []
    close = close or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""
