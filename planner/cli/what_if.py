"""`--what-if bandwidth=25Gbps,memory=40GB,gpus=16`: words to a changed cluster.

Knows keys and units. Does not know what is done with the change.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from planner.cluster.files import did_you_mean
from planner.console import DEVICES, SAMPLES
from planner.errors import UsageError
from planner.explain.changes import WhatIf
from planner.report import parse_bytes

__all__ = ["WHAT_IF_KEYS", "parse_what_if"]

_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BIT_RATE = re.compile(r"([kmgt]?)(?:bps|bit/s)", re.IGNORECASE)
_BYTE_RATE = re.compile(r"([kKmMgGtT]?)B/s")
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(.*?)\s*")
_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


def parse_what_if(text: str) -> WhatIf:
    """The change that comma-separated `key=value` pairs ask for.

    Raises:
        UsageError: a key is unknown or stands twice, or a value has no number or unit of its kind.
    """
    found, given = WhatIf(), set[str]()
    for part in text.split(","):
        key, equals, value = (words.strip() for words in part.partition("="))
        if key not in _KEYS:
            hint = did_you_mean(key, list(_KEYS)) or f"known: {', '.join(_KEYS)}"
            raise UsageError(f"--what-if {text!r}: unknown key {key!r}", hint=hint)
        if not equals or not value:
            raise UsageError(
                f"--what-if {text!r}: {key} has no value", hint=f"write {_KEYS[key][2]}"
            )
        if key in given:
            raise UsageError(f"--what-if {text!r}: {key} stands twice", hint="give it once")
        given.add(key)
        field, parse, example = _KEYS[key]
        found = replace(found, **{field: parse(value, f"--what-if {key}={value}", example)})
    return found


def _parse_bandwidth(text: str, where: str = "", example: str = "25Gbps") -> float:
    """Bytes per second of `25Gbps`, `25Gbit/s` (10^9 bits) or `3.1GB/s` (10^9 bytes).

    Raises:
        UsageError: it is neither, or not above 0.
    """
    number, unit = _number(text, where or repr(text), example)
    unit = unit.replace(" ", "")
    if bits := _BIT_RATE.fullmatch(unit):
        return number * _BITS[bits[1].lower()] / 8
    if num_bytes := _BYTE_RATE.fullmatch(unit):
        return number * _BITS[num_bytes[1].lower()]
    raise UsageError(
        f"{where or repr(text)}: {unit or 'no unit'} is no unit of bandwidth",
        hint=f"write bits as in {example} or bytes as in 3GB/s",
    )


def _parse_seconds(text: str, where: str, example: str) -> float:
    number, unit = _number(text, where, example)
    if unit not in _PER_SECOND:
        raise UsageError(
            f"{where}: {unit or 'no unit'} is no unit of time", hint=f"write {example}"
        )
    return number / _PER_SECOND[unit]


def _parse_memory(text: str, where: str, example: str) -> int:
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=f"write {example}") from None


def _count_up_to(most: int) -> Callable[[str, str, str], int]:
    def parse(text: str, where: str, example: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise UsageError(
                f"{where}: {text} is not a whole number from 1 to {most}", hint=f"write {example}"
            )
        return int(text)

    return parse


def _number(text: str, where: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None or float(match[1]) <= 0 or len(match[1]) > _MAX_DIGITS:
        raise UsageError(f"{where}: {text} is not a number above 0", hint=f"write {example}")
    return float(match[1]), match[2]


_MAX_DIGITS = 20
_KEYS: Mapping[str, tuple[str, Callable[[str, str, str], Any], str]] = {
    "bandwidth": ("bandwidth", _parse_bandwidth, "bandwidth=25Gbps"),
    "latency": ("latency_seconds", _parse_seconds, "latency=5us"),
    "host-bandwidth": ("host_bandwidth", _parse_bandwidth, "host-bandwidth=600GB/s"),
    "memory": ("memory_bytes", _parse_memory, "memory=40GB"),
    "gpus": ("num_devices", _count_up_to(DEVICES.most), "gpus=16"),
    "batch-size": ("global_batch_size", _count_up_to(SAMPLES.most), "batch-size=256"),
}
"""Field of WhatIf, parser and example, by key."""
WHAT_IF_KEYS = tuple(_KEYS)
