"""Explanations as words, tables and plots."""

import csv
import io
import xml.etree.ElementTree as ElementTree

import pytest
from explain_problems import chain_problem, planner
from rich.console import Console
from rich.table import Table
from synthetic import chain_placement, chain_plan

from planner.explain.comparison import side_of
from planner.explain.explanation import explain
from planner.explain.families import FAMILIES
from planner.explain.frontier import Point
from planner.explain.shares import find_bottleneck
from planner.explain.types import simulator
from planner.report import (
    better_lines,
    bottleneck_lines,
    device_curve,
    families_table,
    frontier_table,
    frontiers_csv,
    frontiers_html,
    frontiers_svg,
    memory_curve,
    offers_table,
    plot_text,
    sides_table,
)
from planner.simulate import simulate
from planner.solve import solve


def text_of(table: Table) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def points(*figures: tuple[int, float]) -> list[Point]:
    return [
        Point(placement=chain_placement(2, 2, 2), step_seconds=seconds, peak_bytes=num_bytes)
        for num_bytes, seconds in figures
    ]


@pytest.mark.parametrize(
    ("layers", "devices", "batch"), [pytest.param(6, 4, 16, marks=pytest.mark.slow), (1, 1, 1)]
)
def test_an_explanation_in_words(layers: int, devices: int, batch: int) -> None:
    problem = chain_problem(layers, devices, batch=batch)
    made = planner()
    solution = solve(problem, simulator(made(problem)))
    placement = solution.placement
    found = explain(problem, made, placement, made(problem)(placement), time_limit_seconds=3.0)
    lines = "\n".join(bottleneck_lines(found.bottleneck))
    assert f"rank {found.bottleneck.rank} is busiest" in lines
    assert "is fullest" in lines
    table = text_of(families_table(found.verdicts, solution.step_seconds))
    assert all(family.name in table for family in FAMILIES)
    assert "is the plan" in table
    assert "1.000" in table
    more = text_of(offers_table(found.offers, solution.step_seconds))
    assert all(offer.words in more for offer in found.offers)
    assert bool(better_lines(found)) == (found.better is not None)


def test_a_bottleneck_without_links() -> None:
    plan = chain_plan(1, 1, 1)
    lines = bottleneck_lines(find_bottleneck(plan, simulate(plan), [10**9]))
    assert "nothing is sent" in "\n".join(lines)


def test_two_sides() -> None:
    one, other = chain_plan(4, 2, 2), chain_plan(2, 2, 2, layers_per_stage=2)
    table = text_of(
        sides_table("two", {"a": side_of(one, simulate(one)), "b": side_of(other, simulate(other))})
    )
    assert "2 x 1" not in table
    (stages,) = [line.split() for line in table.splitlines() if line.startswith("stages")]
    assert stages == ["stages", "4", "2"]


@pytest.mark.parametrize("figures", [[(10**6, 1.0)], [(3 * 10**9, 0.1), (10**9, 0.4)], [(0, 0.0)]])
def test_plots_of_any_number_of_points(figures: list[tuple[int, float]]) -> None:
    found = points(*figures)
    for curve in (memory_curve(found), device_curve(found)):
        rows = [line.plain for line in plot_text(curve, width=60, height=8)]
        assert max(map(len, rows)) <= 60
        assert 1 <= sum(row.count("*") for row in rows) <= len(found)
    tree = ElementTree.fromstring(frontiers_svg(found, found))
    marks = [element for element in tree.iter() if element.tag.endswith("circle")]
    assert len(marks) == 2 * len(found)
    assert "</html>" in frontiers_html("a <model>", found, [])
    assert "<model>" not in frontiers_html("a <model>", found, [])
    assert str(found[0].num_devices) in text_of(frontier_table("t", found))


def test_the_csv_has_every_figure() -> None:
    found = points((3 * 10**9, 0.1234567891), (10**9, 0.4))
    rows = list(csv.DictReader(io.StringIO(frontiers_csv(found, found[:1]))))
    assert [row["frontier"] for row in rows] == ["memory", "memory", "devices"]
    assert float(rows[0]["step_seconds"]) == 0.1234567891
    assert int(rows[1]["peak_bytes"]) == 10**9
