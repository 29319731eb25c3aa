"""The bar of the search: on a terminal only, and gone when the search is over."""

import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from planner.cli import search_bar as module
from planner.cli.search_bar import search_bar


def everything(reader: int) -> str:
    """All that a terminal has been sent; a single read may return less."""
    os.set_blocking(reader, False)
    found = b""
    try:
        while piece := os.read(reader, 4096):
            found += piece
    except BlockingIOError:
        return found.decode()
    return found.decode()


def test_a_terminal_sees_the_candidates_the_best_and_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, terminal = os.openpty()
    with open(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(module, "error_console", Console(file=stream, width=120))
        with search_bar() as listener:
            progress = listener("64 samples")
            assert progress is not None
            progress(0, 40, math.inf, 0.0)
            progress(10, 40, 2.0, 1.5)
        stream.flush()
        seen = everything(reader)
    os.close(reader)
    for words in ("64 samples", "10/40", "best 2 s, bound 1.5 s, gap 25.0%"):
        assert words in seen


def test_a_file_sees_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(module, "error_console", Console(file=stream))
        with search_bar() as listener:
            assert listener("searching") is None
    assert (tmp_path / "log").read_text() == ""
