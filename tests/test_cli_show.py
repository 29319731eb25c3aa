"""The command lga-show: what it prints, and the files it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_torch_pipelining import plan_of

from planner.cli.show import main
from planner.export.timeline_file import write_timeline
from planner.export.torch_csv import CsvFormat, print_csv
from planner.plan.file import write_plan
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.timeline import Event, Timeline

PLAN = plan_of(Schedule.LAYERED, 2, 4, 3)


def slower(timeline: Timeline, factor: float) -> Timeline:
    return Timeline(
        source="measured",
        events=tuple(
            Event(
                rank=event.rank,
                index=event.index,
                start_seconds=event.start_seconds * factor,
                end_seconds=event.end_seconds * factor,
            )
            for event in timeline.events
        ),
    )


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    path = tmp_path / "chain.plan.yaml"
    write_plan(PLAN, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "100"})


def test_without_options_it_writes_nothing(plan_path: Path) -> None:
    result = run(plan_path)
    assert result.exit_code == 0, result.output
    for words in ("placement", "memory per device", "instructions per step", "rank 1"):
        assert words in result.output
    assert [file.name for file in plan_path.parent.iterdir()] == [plan_path.name]


def test_planned_and_measured_are_compared_and_traced(plan_path: Path) -> None:
    measured, trace = plan_path.with_name("step.json"), plan_path.with_name("trace.json")
    planned = simulate(PLAN).timeline
    write_timeline(PLAN, slower(planned, 1.25), measured)
    result = run(plan_path, "--measured", measured, "--trace", trace)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    num_forwards = PLAN.num_stages * PLAN.num_micro_batches
    assert rows["FORWARD"][1:] == [str(num_forwards), "12", "s", "15", "s", "1.25"]
    assert rows["BACKWARD"][1:] == [str(num_forwards), "24", "s", "30", "s", "1.25"]
    assert rows["LOAD"][-1] == "-"
    assert {name for name, row in rows.items() if row[-1] == "1.25"} == {
        "FORWARD", "BACKWARD", "SEND", "RECEIVE", "step"
    }  # fmt: skip
    names = {
        event["args"]["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {f"rank {rank} {word}" for rank in (0, 1) for word in ("planned", "measured")}


def test_a_timeline_of_another_plan_is_refused_before_anything_is_written(plan_path: Path) -> None:
    measured, trace = plan_path.with_name("step.json"), plan_path.with_name("trace.json")
    write_timeline(replace(PLAN, micro_batch_size=2), simulate(PLAN).timeline, measured)
    result = run(plan_path, "--measured", measured, "--trace", trace)
    assert result.exit_code == 2
    assert "timeline of another plan" in result.stderr
    assert not trace.exists()


@pytest.mark.parametrize("csv_format", CsvFormat)
def test_the_schedule_is_written_for_torch(csv_format: CsvFormat, plan_path: Path) -> None:
    path = plan_path.with_name("schedule.csv")
    result = run(plan_path, "--csv", path, "--csv-format", csv_format.value)
    assert result.exit_code == 0, result.output
    assert path.read_text() == print_csv(PLAN, csv_format)
    assert ("not for stages wrapped in FSDP" in result.output) is (
        csv_format is CsvFormat.COMPUTE_COMMS
    )


def test_a_skip_connection_is_told(tmp_path: Path) -> None:
    plan_path, csv = tmp_path / "skip.plan.yaml", tmp_path / "schedule.csv"
    write_plan(plan_of(Schedule.LAYERED, 2, 4, 2, skips=((0, 2),)), plan_path)
    result = run(plan_path, "--csv", csv)
    assert result.exit_code == 2
    assert "stage 2 reads skip_0_2 from stage 0" in result.stderr
    assert not csv.exists()


@pytest.mark.parametrize("option", ["--trace", "--csv"])
def test_outputs_that_cannot_be_written_are_refused_first(option: str, plan_path: Path) -> None:
    result = run(plan_path, option, plan_path)
    assert result.exit_code == 2
    assert "is an input of this command" in result.stderr
    assert "placement" not in result.output
    result = run(plan_path, option, plan_path.parent / "nowhere" / "x")
    assert result.exit_code == 2
    assert option in result.stderr
