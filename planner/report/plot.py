"""Curves of a few points: as letters in a terminal, and as SVG.

This module knows axes and marks. It does not know what is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rich.text import Text

__all__ = ["Curve", "plot_svg", "plot_text"]

_WIDTH, _HEIGHT = 640, 360
_LEFT, _BOTTOM, _TOP, _RIGHT = 90, 56, 36, 24
_NUM_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points to draw, and how to name their figures."""

    title: str
    x_label: str
    y_label: str
    points: Sequence[tuple[float, float]]
    """(x, y), both at least 0; at least one."""
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]


def plot_text(curve: Curve, *, width: int = 72, height: int = 14) -> list[Text]:
    """The points as stars over two axes from 0, in at most `width` columns."""
    head = max(len(curve.y_text(y)) for _, y in curve.points) + 1
    columns, rows = max(10, width - head - 1), max(3, height)
    most_x, most_y = _extent(curve)
    cells = [[" "] * columns for _ in range(rows)]
    for x, y in curve.points:
        column = min(columns - 1, round(x / most_x * (columns - 1)))
        row = min(rows - 1, round(y / most_y * (rows - 1)))
        cells[rows - 1 - row][column] = "*"
    lines = [Text(f"{curve.title}: {curve.y_label} over {curve.x_label}", style="bold")]
    for index, cell in enumerate(cells):
        label = {0: curve.y_text(most_y), rows - 1: "0"}.get(index, "")
        lines.append(Text(f"{label:>{head}}|").append("".join(cell).rstrip(), style="green"))
    end = curve.x_text(most_x)
    lines.append(Text(" " * head + "+" + "-" * columns))
    lines.append(Text(" " * (head + 1) + "0" + end.rjust(columns - 1)))
    return lines


def plot_svg(curves: Sequence[Curve]) -> str:
    """The plots below each other, points joined by steps: between two of them, the slower plan is
    the one that fits."""
    height = _HEIGHT * len(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, curve in enumerate(curves):
        parts += [f'<g transform="translate(0 {number * _HEIGHT})">', *_drawn(curve), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _drawn(curve: Curve) -> list[str]:
    most_x, most_y = _extent(curve)
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + inner_width * x / most_x, _HEIGHT - _BOTTOM - inner_height * y / most_y

    parts = [
        _label(_WIDTH / 2, 20, curve.title, "middle", weight="bold"),
        _label(_LEFT + inner_width / 2, _HEIGHT - 12, curve.x_label, "middle"),
        _label(_LEFT, _TOP - 8, curve.y_label, "end"),
    ]
    for number in range(_NUM_TICKS + 1):
        x, y = most_x * number / _NUM_TICKS, most_y * number / _NUM_TICKS
        (left, low), (right, _) = place(0, y), place(most_x, y)
        parts.append(_line(left, low, right, low, "#ddd"))
        parts.append(_label(left - 6, low + 4, curve.y_text(y) if y else "0", "end"))
        column, bottom = place(x, 0)
        parts.append(_label(column, bottom + 18, curve.x_text(x) if x else "0", "middle"))
    corner, far, high = place(0, 0), place(most_x, 0), place(0, most_y)
    parts += [_line(*corner, *far, "black"), _line(*corner, *high, "black")]
    parts += _steps([place(x, y) for x, y in sorted(curve.points)])
    for x, y in curve.points:
        column, row = place(x, y)
        note = escape(f"{curve.x_text(x)}, {curve.y_text(y)}")
        parts.append(
            f'<circle cx="{column:.1f}" cy="{row:.1f}" r="4" fill="#1f6feb">'
            f"<title>{note}</title></circle>"
        )
    return parts


def _extent(curve: Curve) -> tuple[float, float]:
    most_x = max(x for x, _ in curve.points)
    most_y = max(y for _, y in curve.points)
    return most_x or 1.0, most_y or 1.0


def _steps(places: Sequence[tuple[float, float]]) -> list[str]:
    if len(places) < 2:
        return []
    path = [f"M{places[0][0]:.1f},{places[0][1]:.1f}"]
    path += [f"H{x:.1f}V{y:.1f}" for x, y in places[1:]]
    return [f'<path d="{"".join(path)}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>']


def _label(x: float, y: float, words: str, anchor: str, *, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def _line(x: float, y: float, end_x: float, end_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}" stroke="{colour}"/>'
