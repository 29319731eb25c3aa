"""A bar for the solver's search, on standard error and only on a terminal.

Knows rich. Does not know what the solver does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress

from planner.console import error_console
from planner.report import seconds_text
from planner.solve import Progress

__all__ = ["search_bar"]


@contextmanager
def search_bar() -> Iterator[Callable[[str], Progress | None]]:
    """From the words for a search to its listener; there is none where nobody could see the bar."""
    if not error_console.is_terminal:
        yield lambda _: None
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("{task.fields[found]}"),
    )
    with rich_progress.Progress(*columns, console=error_console, transient=True) as bar:
        task = bar.add_task("searching", total=None, found="")

        def listener(words: str) -> Progress:
            bar.reset(task, total=None, description=words, found="")

            def heard(done: int, total: int, best_seconds: float, bound_seconds: float) -> None:
                found = _found(best_seconds, bound_seconds)
                bar.update(task, completed=done, total=total, found=found)

            return heard

        yield listener


def _found(best_seconds: float, bound_seconds: float) -> str:
    if best_seconds == math.inf:
        return "nothing fits yet"
    gap = max(0.0, 1 - bound_seconds / best_seconds)
    return f"best {seconds_text(best_seconds)}, bound {seconds_text(bound_seconds)}, gap {gap:.1%}"
