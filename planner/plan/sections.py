"""Sections of a plan file: YAML text under a line of checksums, one for each section.

Printing keeps one thing on one line, so that two plans can be compared line by line. Reading
verifies every checksum before YAML sees the text, and then makes values from YAML's events alone:
no tags, anchors, aliases or deep nesting, so that reading never runs anything nor fills memory.
This module knows text, checksums and YAML. It does not know what a plan is.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import count, islice, pairwise
from typing import Any

import yaml

from planner.errors import PlanFileError

__all__ = ["HINT", "Row", "Section", "load_sections", "print_sections", "verified_sections"]

HINT = "a plan file is not meant to be edited: make it again with lga-plan"
_MAX_DEPTH = 20
_MAX_EVENTS = 600_000
"""Of YAML in a file: a plan of a million instructions has a third of it."""
_MAX_SECTIONS = 100
_MAX_INTEGER = 2**63
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?[0-9]{1,30}\.[0-9]{0,30}(?:e[-+][0-9]{1,3})?")
_WORDS = {
    "null": None, "true": True, "false": False,
    ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
_CHECKSUM = re.compile(r"checksums: \{(.*)\}")
_BEGINS = re.compile(rb"\n(?=[^\s-])")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Row(dict[str, Any]):
    """A mapping printed on one line."""


class Section(dict[str, Any]):
    """A mapping whose keys stand at the start of a line."""


class _Dumper(_BaseDumper):  # type: ignore[misc]  # the C dumper has no stub
    """Prints text of several lines as literal blocks, and rows on one line."""


for _kind, _in_one_line in ((Row, True), (Section, False)):
    _Dumper.add_representer(
        _kind,
        lambda dumper, mapping, in_one_line=_in_one_line: dumper.represent_mapping(
            "tag:yaml.org,2002:map", mapping, flow_style=in_one_line
        ),
    )
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=_style_of(text)
    ),
)


def print_sections(version: int, sections: dict[str, Any]) -> str:
    """The whole file: version, checksums, and each section's YAML."""
    texts = {name: _dump(Section({name: value})) for name, value in sections.items()}
    checksums = {name: _checksum(text.encode()) for name, text in texts.items()}
    return f"lga_plan: {version}\n{_checksum_line(checksums)}\n" + "".join(texts.values())


def verified_sections(content: bytes, version: int, source: str) -> dict[str, memoryview]:
    """Section name -> its text, after the version and every checksum have been compared.

    Raises:
        PlanFileError: not a plan, another version, or changed since it was written; names what.
    """
    head = re.match(rb"lga_plan: ([0-9]{1,9})\n", content)
    if head is None:
        first_line = content[:100].partition(b"\n")[0].decode(errors="replace")
        raise PlanFileError(
            f"{source} is not a plan: its first line is {first_line[:60]!r}, "
            f"not 'lga_plan: {version}'",
            hint="make a plan with lga-plan MODEL --gpus N",
        )
    if int(head[1]) != version:
        raise PlanFileError(
            f"{source} has format version {int(head[1])}; this lga-plan reads {version}",
            hint="make the plan again with this version",
        )
    second, num_parts, found = _split(content, head.end())
    expected = _expected_checksums(second)
    checksums = {name: _checksum(part) for name, part in found.items()}
    changed = [
        name
        for name in {**expected, **checksums}
        if name not in checksums or expected.get(name) != checksums[name]
    ]
    if changed or num_parts != len(found) or second != _checksum_line(checksums):
        names = ", ".join(repr(name[:40]) for name in changed[:5]) or "its checksums"
        raise PlanFileError(
            f"{source} was changed after it was written (or cut short): the content of {names} "
            "does not match the file's checksums",
            hint=HINT,
        )
    return found


def load_sections(texts: dict[str, memoryview], source: str) -> dict[str, Any]:
    """The value of each section, whose text is a mapping of its name alone.

    Raises:
        PlanFileError: a text is no such mapping, nests too deeply, or uses tags, anchors or
            aliases; or there are too many values in all.
    """
    budget = count()
    try:
        return {name: _load(name, text, budget) for name, text in texts.items()}
    except (yaml.YAMLError, ValueError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanFileError(f"{source} is not plain YAML: {reason}", hint=HINT) from None


def _split(content: bytes, start: int) -> tuple[str, int, dict[str, memoryview]]:
    """The line of checksums, the number of sections, and the sections by name.

    A section begins where a line begins with neither a blank nor a dash.
    """
    end = content.find(b"\n", start) + 1 or len(content)
    second = content[start:end].removesuffix(b"\n")[: 100 * _MAX_SECTIONS].decode(errors="replace")
    starts = [end] if end < len(content) else []
    starts += [found.end() for found in islice(_BEGINS.finditer(content, end), _MAX_SECTIONS)]
    view = memoryview(content)
    parts = {}
    for first, last in pairwise([*starts, len(content)]):
        name = bytes(view[first : min(last, first + 100)]).partition(b":")[0]
        parts[name.decode(errors="replace")] = view[first:last]
    return second, len(starts), parts


def _expected_checksums(line: str) -> dict[str, str]:
    found = _CHECKSUM.fullmatch(line)
    pairs = (word.partition(": ") for word in found[1].split(", ")) if found else ()
    return {name: checksum for name, _, checksum in pairs if name}


def _load(name: str, text: memoryview, budget: Iterator[int]) -> Any:
    # One document of one mapping: whatever else stands there is an extra key or an extra event.
    events = _counted(yaml.parse(bytes(text), _Loader), budget)
    next(events), next(events)
    loaded = _value(next(events), events, 0)
    next(events)
    ended = isinstance(next(events), yaml.StreamEndEvent)
    if not ended or not isinstance(loaded, dict) or list(loaded) != [name]:
        raise ValueError(f"section {name[:40]} is not one mapping of its name")
    return loaded[name]


def _counted(events: Iterator[yaml.Event], budget: Iterator[int]) -> Iterator[yaml.Event]:
    for event in events:
        if next(budget) == _MAX_EVENTS:
            raise ValueError(f"it has more than {_MAX_EVENTS} values")
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            raise ValueError("it uses tags, anchors or aliases")
        yield event


def _value(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
    """What `event` begins, taken from `events` to its end."""
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    if depth == _MAX_DEPTH:
        raise ValueError("it nests too deeply")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, depth + 1))
        return items
    if not isinstance(event, yaml.MappingStartEvent):
        raise ValueError("it has an empty document")
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _value(event, events, depth + 1)
        if not isinstance(key, str) or key in mapping:
            raise ValueError(f"key {str(key)[:40]!r} is no text or stands twice")
        mapping[key] = _value(next(events), events, depth + 1)
    return mapping


def _scalar(text: str) -> Any:
    """The value of a scalar without quotes, of the forms that the writer uses; all else is text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and abs(number := int(text)) < _MAX_INTEGER:
        return number
    return float(text) if _FLOAT.fullmatch(text) else text


def _style_of(text: str) -> str | None:
    """A literal block for lines, quotes with escapes for what an editor would not show."""
    if text.isprintable():
        return None
    in_lines = text.endswith("\n") and not text.endswith("\n\n") and not text[0].isspace()
    return "|" if in_lines and text.replace("\n", "").isprintable() else '"'


def _dump(section: Section) -> str:
    text: str = yaml.dump(
        section,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=1 << 30,
    )
    return text


def _checksum_line(checksums: dict[str, str]) -> str:
    words = ", ".join(f"{name}: {checksum}" for name, checksum in checksums.items())
    return f"checksums: {{{words}}}"


def _checksum(text: bytes | memoryview) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
