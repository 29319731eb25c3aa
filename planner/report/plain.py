"""Tables without lines: columns of words, then columns of numbers.

This module knows rich's tables. It does not know what is in them.
"""

from collections.abc import Sequence

from rich.table import Table

__all__ = ["plain_table"]


def plain_table(title: str | None, words: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """A table without rows; numbers stand to the right in their columns."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0)
    )
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
