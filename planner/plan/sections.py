"""Sections of a plan file: YAML text under a line of checksums, one for each section.

Printing keeps one thing on one line, so that two plans can be compared line by line. Reading
verifies every checksum before YAML sees the text, and loads YAML safely, without aliases, tags or
deep nesting. This module knows text, checksums and YAML. It does not know what a plan is.
"""

import hashlib
import re
from typing import Any

import yaml

from planner.errors import PlanFileError

__all__ = ["HINT", "Row", "Section", "load_sections", "print_sections", "verified_sections"]

HINT = "a plan file is not meant to be edited: make it again with lga-plan"
_MAX_DEPTH = 20
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
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def print_sections(version: int, sections: dict[str, Any]) -> str:
    """The whole file: version, checksums, and each section's YAML."""
    texts = {name: _dump(Section({name: value})) for name, value in sections.items()}
    return f"lga_plan: {version}\n{_checksum_line(texts)}\n" + "".join(texts.values())


def verified_sections(text: str, version: int, source: str) -> dict[str, str]:
    """Section name -> its text, after the version and every checksum have been compared.

    Raises:
        PlanFileError: not a plan, another version, or changed since it was written; names what.
    """
    head = re.match(r"lga_plan: (\d{1,9})\n", text)
    if head is None:
        raise PlanFileError(
            f"{source} is not a plan: its first line is {text.partition(chr(10))[0][:60]!r}, "
            f"not 'lga_plan: {version}'",
            hint="make a plan with lga-plan MODEL --gpus N",
        )
    if int(head[1]) != version:
        raise PlanFileError(
            f"{source} has format version {head[1]}; this lga-plan reads {version}",
            hint="make the plan again with this version",
        )
    second, _, body = text[head.end() :].partition("\n")
    expected = dict(re.findall(r"(\w+): ([0-9a-f]+)", second))
    parts = [part for part in re.split(r"(?m)^(?=[^\s-])", body) if part]
    found = {part.partition(":")[0]: part for part in parts}
    changed = [
        name
        for name in {**expected, **found}
        if name not in found or _checksum(found[name]) != expected.get(name)
    ]
    if changed or len(parts) != len(found) or second != _checksum_line(found):
        names = ", ".join(repr(name[:40]) for name in changed[:5]) or "its checksums"
        raise PlanFileError(
            f"{source} was changed after it was written (or cut short): the content of {names} "
            "does not match the file's checksums",
            hint=HINT,
        )
    return found


def load_sections(text: str, source: str) -> dict[str, Any]:
    """The values of the sections.

    Raises:
        PlanFileError: the text is not YAML, nests too deeply, or uses aliases.
    """
    try:
        depth = 0
        # The loader recurses in C: nesting and aliases are bounded before it sees the text.
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise PlanFileError(f"{source} nests too deeply or uses aliases", hint=HINT)
        loaded = yaml.load(text, _Loader)  # _Loader is the safe one
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanFileError(f"{source} is not YAML: {reason}", hint=HINT) from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise PlanFileError(f"{source} holds no sections", hint=HINT)
    return loaded


def _dump(section: Section) -> str:
    return yaml.dump(
        section,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=1 << 30,
    )


def _checksum_line(texts: dict[str, str]) -> str:
    words = ", ".join(f"{name}: {_checksum(text)}" for name, text in texts.items())
    return f"checksums: {{{words}}}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
