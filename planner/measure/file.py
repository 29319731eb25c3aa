"""The profile file: what was measured of a model, as YAML that reads back equal.

Reading runs nothing: plain data, validated against the types. This module knows the file's form. It
does not know whether the profile belongs to a model or a cluster at hand.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from planner.errors import UsageError
from planner.files import write_text
from planner.measure.clock import Seconds
from planner.measure.measured import MeasuredLayer, MeasuredModel, MeasuredSize

__all__ = ["parse_profile", "print_profile", "read_profile", "write_profile"]

_FORMAT = "lga_profile"
_VERSION = 2
_END = "complete"
"""The last key: a file without it has been cut short."""
_MAX_BYTES = 100_000_000
_MAX_DEPTH = 50
"""Of lists in lists: a file has about ten, and a parser written in C has no limit but its stack."""
_HINT = "measure again with lga-profile MODEL"
# Those written in C where PyYAML has them: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# In a tuple, because pydantic takes the configuration of a bare dataclass from that class alone.
_MODEL: TypeAdapter[tuple[MeasuredModel]] = TypeAdapter(
    tuple[MeasuredModel], config=ConfigDict(extra="forbid", strict=True)
)


def print_profile(measured: MeasuredModel) -> str:
    """The profile as text; `parse_profile(print_profile(m)) == m`."""
    content = {_FORMAT: _VERSION, **_plain(asdict(measured)), _END: True}
    text: str = yaml.dump(
        content,
        Dumper=_DUMPER,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )
    return text


def parse_profile(text: str, *, source: str = "profile") -> MeasuredModel:
    """Read a profile back; `source` names it in messages.

    Raises:
        UsageError: the text is no profile, of another version, or inconsistent in itself.
    """
    try:
        _check_form(text, source)
        content = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _bad(source, f"is not YAML of plain data: {str(error)[:200]}") from None
    if not isinstance(content, dict) or _FORMAT not in content:
        raise _bad(source, f"is no profile of a model: it has no key {_FORMAT}")
    if (version := content.pop(_FORMAT)) != _VERSION:
        raise _bad(source, f"has version {version!r:.40}; this lga-plan reads {_VERSION}")
    if content.pop(_END, False) is not True:
        raise _bad(source, f"has been cut short: it does not end with {_END}: true")
    try:
        # Through JSON, where pydantic's strict mode takes lists for tuples.
        (measured,) = _MODEL.validate_json(json.dumps([content]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"][1:]))
        raise _bad(source, f"does not validate: {key}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad(source, f"does not validate: {error}") from None
    for problem in _inconsistencies(measured):
        raise _bad(source, problem)
    return measured


def read_profile(path: str | Path) -> MeasuredModel:
    """Read a profile file.

    Raises:
        UsageError: there is no such file, or it holds no profile.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise _bad(str(path), "cannot be read: it is no regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise _bad(str(path), f"has more than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no profile file {str(path)!r}", hint=_HINT) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(str(path), f"cannot be read: {error}") from None
    return parse_profile(text, source=str(path))


def write_profile(measured: MeasuredModel, path: str | Path) -> None:
    """Write the profile file, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    write_text(path, print_profile(measured), hint="give another path with --output")


def _check_form(text: str, source: str) -> None:
    """Refuse what a small file could fill memory with: aliases of aliases, lists without end."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise _bad(source, f"has an alias (*{event.anchor}), which no profile needs")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _bad(source, f"has lists in lists, more than {_MAX_DEPTH} deep")


def _inconsistencies(measured: MeasuredModel) -> Iterator[str]:
    """What types alone do not say."""
    numbers = {
        "num_repeats": measured.num_repeats,
        "device.num_threads": measured.device.num_threads,
        "device.num_cores": measured.device.num_cores,
    }
    for name, number in numbers.items():
        if number < 1:
            yield f"has {name} {number}, less than 1"
    sizes = [size.micro_batch_size for size in measured.sizes]
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        yield f"has micro-batch sizes {sizes}: not one or more, ascending, from 1"
    everywhere = [name for size in measured.sizes[:1] for name in _names(size)]
    for size in measured.sizes:
        names = _names(size)
        if not names or len(set(names)) < len(names):
            yield f"names a layer twice, or none, at micro-batch size {size.micro_batch_size}"
        if set(names) != set(everywhere):
            yield f"has other layers at micro-batch size {size.micro_batch_size} than at the first"
        for layer in size.layers:
            if problem := _layer_problem(layer):
                yield f"has layer {layer.layers[:1]!r} {problem}"


def _names(size: MeasuredSize) -> list[str]:
    return [name for layer in size.layers for name in layer.layers]


def _layer_problem(layer: MeasuredLayer) -> str:
    profile = layer.profile
    if not layer.layers or profile.name != layer.layers[0]:
        return f"with the profile of {profile.name!r}"
    medians = {
        "forward": profile.forward_seconds,
        "backward": profile.backward_seconds,
        "recompute": profile.recompute_seconds,
        "update": profile.update_seconds,
    }
    for name, median in medians.items():
        seconds: Seconds = getattr(layer, name)
        if median is None or median != seconds.median:
            return f"with {name} seconds of {median}, which is not the median {seconds.median}"
        if not all(math.isfinite(x) and x >= 0 for x in (seconds.median, seconds.spread)):
            return f"with {name} seconds {seconds}: not finite and 0 or more"
    if profile.forward_seconds == 0:
        return "with a forward of 0 seconds"
    if layer.optimizer_bytes < 0:
        return f"with optimizer_bytes {layer.optimizer_bytes}, less than 0"
    return ""


def _plain(value: Any) -> Any:
    """Without tuples and enumerations, which YAML of plain data has no word for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _bad(source: str, problem: str) -> UsageError:
    return UsageError(f"{source} {problem}", hint=_HINT)
