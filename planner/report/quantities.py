"""Bytes, seconds and counts as short words, and bytes back from words."""

import math
import re

from planner.errors import UsageError

__all__ = ["bytes_text", "count_text", "parse_bytes", "seconds_text"]

_DECIMAL = ("", "k", "M", "G", "T", "P")
_UNITS = {
    **{f"{letter}B".lower(): 1000**power for power, letter in enumerate(_DECIMAL)},
    **{f"{letter}iB".lower(): 1024**power for power, letter in enumerate(_DECIMAL) if power},
    **{letter.lower(): 1000**power for power, letter in enumerate(_DECIMAL)},
}

_TOO_MANY_BYTES = 2.0**80


def bytes_text(num_bytes: float) -> str:
    """`1.24 GB`: decimal units, three digits."""
    return f"{_scaled(num_bytes)}B"


def count_text(number: float) -> str:
    """`1.26 T`: three digits."""
    return _scaled(number).strip()


def seconds_text(seconds: float) -> str:
    """`12.3 ms`: three digits in s, ms or us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.9995 * scale or unit == "us":  # to three digits
            return f"{seconds / scale:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    raise AssertionError


def parse_bytes(text: str) -> int:
    """`40GB` (10^9), `40GiB` (2^30) or plain bytes.

    Raises:
        UsageError: it is neither, or not above 0, or more than any memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if text.strip().startswith("-"):
        raise UsageError(f"{text!r} is below 0 bytes", hint="write a size such as 40GB")
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(
            f"{text!r} is not a number of bytes",
            hint="write a size such as 40GB, 512MiB or 4000000000",
        )
    number = float(match[1]) * _UNITS[match[2].lower()]
    if number >= _TOO_MANY_BYTES:
        raise UsageError(f"{text[:40]!r} is more than any memory", hint="write a size such as 40GB")
    num_bytes = int(number)
    if num_bytes < 1:
        raise UsageError(f"{text!r} is no memory at all", hint="write a size such as 40GB")
    return num_bytes


def _scaled(number: float) -> str:
    power = min(int(math.log10(number) / 3), len(_DECIMAL) - 1) if number >= 1 else 0
    value = number / 1000**power
    if value >= 999.5 and power < len(_DECIMAL) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_DECIMAL[power]}"
