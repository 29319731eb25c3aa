"""Quantities in words, and the timeline in letters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic import chain_plan

from planner.check import check
from planner.errors import UsageError
from planner.export.skeleton import StageCosts, ideal_cluster, skeleton_plan
from planner.export.torch_import import parse_csv
from planner.report import (
    bytes_text,
    count_text,
    memory_table,
    parse_bytes,
    placement_table,
    plan_lines,
    program_counts,
    rules_table,
    seconds_text,
    timeline_rows,
)
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.timeline import Timeline


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("40GB", 40 * 10**9), ("40 GiB", 40 * 2**30), ("512mib", 512 * 2**20), ("1.5kB", 1500),
        ("1000", 1000), (".5TB", 5 * 10**11), ("7B", 7), ("8G", 8 * 10**9),
    ],
)  # fmt: skip
def test_bytes_from_words(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "40XB", "0", "0.1", "1e9", "nan", "4,0GB", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"memory|bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (999_999, "1 MB")],
)
def test_bytes_in_words(num_bytes: int, text: str) -> None:
    assert bytes_text(num_bytes) == text


@given(st.integers(1, 10**17))
def test_bytes_survive_words_to_three_digits(num_bytes: int) -> None:
    assert parse_bytes(bytes_text(num_bytes)) == pytest.approx(num_bytes, rel=5.1e-3)


def test_counts_and_seconds_in_words() -> None:
    assert [count_text(n) for n in (7, 1.258e12)] == ["7", "1.26 T"]
    assert [seconds_text(s) for s in (0, 2e-6, 0.0123, 1.5, 4321)] == [
        "0 us", "2 us", "12.3 ms", "1.5 s", "4321 s"
    ]  # fmt: skip


def test_seconds_that_round_up_take_the_next_unit() -> None:
    assert [seconds_text(s) for s in (0.9994, 0.9999, 0.99996e-3, 999.4, 999.7)] == [
        "999 ms", "1 s", "1 ms", "999 s", "1000 s"
    ]  # fmt: skip


def test_the_timeline_in_letters() -> None:
    plan = chain_plan(2, 2, 1)
    first, second, axis, *legend = (
        row.plain for row in timeline_rows(plan, simulate(plan).timeline, width=8 + 12)
    )
    assert first == "rank 0  aa......AAAA"
    assert second == "rank 1  ..bbBBBB...."
    assert axis.startswith("        0")
    assert axis.endswith(" 6 s")
    assert "a to b: stages 0 to 1 forward" in legend[0]


def test_recompute_has_its_own_sign() -> None:
    plan = chain_plan(1, 1, 1, recompute=True)
    row, *_ = timeline_rows(plan, simulate(plan).timeline, width=8 + 12)
    assert row.plain == "rank 0  aaa+++AAAAAA"


def test_a_timeline_of_nothing_is_idle() -> None:
    plan = chain_plan(1, 1, 1)
    row, *_ = timeline_rows(plan, Timeline(source="simulated", events=()), width=20)
    assert set(row.plain.removeprefix("rank 0  ")) == {"."}


def test_tables_fit_eighty_columns_and_hold_their_figures() -> None:
    plan = chain_plan(8, 4, 2, num_replicas=2, partition=3)
    simulation = simulate(plan)
    console = Console(width=80)
    for table in (
        placement_table(plan),
        memory_table(plan, simulation),
        program_counts(plan),
        rules_table(check(plan)),
    ):
        with console.capture() as capture:
            console.print(table)
        assert table.row_count in (4, 8, 10)
        assert "\u2026" not in capture.get()
    lines = plan_lines(plan)
    assert "8 layers" in lines[0]
    assert "2 replicas x 4 pipeline ranks" in lines[2]
    assert lines[3].startswith("batch     4 samples")


def test_halves_of_backward_have_letters_of_their_own() -> None:
    plan = chain_plan(2, 2, 3, schedule=Schedule.ZERO_BUBBLE)
    rows = [str(row) for row in timeline_rows(plan, simulate(plan).timeline, width=60)]
    assert "B" in rows[1]
    assert "=" in rows[1]
    assert "=: weight gradients" in rows[-1]


def test_a_letter_that_any_rank_uses_is_explained() -> None:
    schedule = parse_csv("0F0,0B0\n1F0,1I0,1W0\n")
    plan = skeleton_plan(schedule, StageCosts(), ideal_cluster(2))
    rows = timeline_rows(plan, simulate(plan).timeline, width=60)
    assert "=" in str(rows[1])
    assert "=: weight gradients" in str(rows[-1])
