"""lga-run --timeline: what real processes measure, laid over the plan."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_launch import MODEL, in_process, lga_run, two_rank_plan

from planner.cli.show import main as show
from planner.errors import UsageError
from planner.export.timeline_file import read_timeline
from planner.model_file import load_model_file
from planner.plan.file import write_plan
from runtime.main import run_rank
from runtime.options import RunOptions


def test_a_run_leaves_the_timeline_of_its_last_step(tmp_path: Path) -> None:
    plan, plan_path = two_rank_plan(), tmp_path / "chain.plan.yaml"
    write_plan(plan, plan_path)
    timeline_path, trace = tmp_path / "step.json", tmp_path / "trace.json"
    process = lga_run(str(plan_path), "--steps=3", "--seed=4", f"--timeline={timeline_path}")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "timeline of the last step written to" in output
    measured = read_timeline(timeline_path, plan)
    assert measured.source == "measured"
    assert len(measured.events) == sum(map(len, plan.programs))
    assert measured.step_seconds > 0
    result = CliRunner().invoke(
        show, [str(plan_path), f"--measured={timeline_path}", f"--trace={trace}"]
    )
    assert result.exit_code == 0, result.output
    assert "predicted and measured" in result.output
    slices = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == 2 * len(measured.events)


def test_a_timeline_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    plan_path = tmp_path / "chain.plan.yaml"
    write_plan(two_rank_plan(), plan_path)
    result = in_process(str(plan_path), MODEL, f"--timeline={tmp_path / 'nowhere' / 'step.json'}")
    assert result.exit_code == 2
    assert "--timeline" in result.stderr


def test_a_timeline_needs_a_step_after_the_verified_one(tmp_path: Path) -> None:
    plan = two_rank_plan()
    options = RunOptions(num_steps=1, verify=True, timeline_path=tmp_path / "step.json")
    with pytest.raises(UsageError, match="--verify takes the only one"):
        run_rank(plan, load_model_file(MODEL), options)
