"""`lga-check` simulates a plan again: what the plan claims of itself must be so."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic import chain_plan

from planner.cli.check import main
from planner.plan.file import write_plan
from planner.plan.types import Plan, Prediction
from planner.simulate import simulate


def claiming(plan: Plan, **claims: object) -> Plan:
    found = simulate(plan)
    prediction = Prediction(
        step_seconds=found.step_seconds,
        bubble=found.bubble,
        peak_bytes=found.peak_bytes,
        memory_limit_bytes=10**15,
        provenance="made for a test",
    )
    return replace(plan, prediction=replace(prediction, **claims))  # type: ignore[arg-type]


def run(plan: Plan, folder: Path) -> tuple[int, str]:
    path = folder / "a.plan.yaml"
    write_plan(plan, path)
    result = CliRunner().invoke(main, [str(path)])
    return result.exit_code, result.output


def test_true_claims_pass(tmp_path: Path) -> None:
    plan = chain_plan()
    step = simulate(plan).step_seconds
    code, output = run(claiming(plan, bound_seconds=0.9 * step), tmp_path)
    assert code == 0
    assert "as the plan says" in output
    assert "the gap to its bound is 10.00%" in output


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [
        ("step_seconds", 0.9, "step in seconds"),
        ("step_seconds", 1.1, "step in seconds"),
        ("bound_seconds", 1.1, "no plan takes less"),
    ],
)
def test_false_claims_fail(tmp_path: Path, name: str, factor: float, words: str) -> None:
    plan = chain_plan()
    step = simulate(plan).step_seconds
    code, output = run(claiming(plan, **{name: factor * step}), tmp_path)
    assert code == 1
    assert words in " ".join(output.split())


def test_false_peaks_fail(tmp_path: Path) -> None:
    plan = chain_plan()
    peaks = simulate(plan).peak_bytes
    code, output = run(claiming(plan, peak_bytes=(peaks[0] + 1, *peaks[1:])), tmp_path)
    assert code == 1
    assert "peak of rank 0" in " ".join(output.split())
