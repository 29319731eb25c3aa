"""The command lga-import."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.check import check
from planner.cli.import_csv import main
from planner.cli.show import main as show
from planner.plan.file import read_plan
from planner.schedules import Schedule

ONE_F_ONE_B = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def run(folder: Path, text: str, *arguments: str) -> Result:
    csv = folder / "schedule.csv"
    csv.write_text(text)
    output = f"--output={folder / 'schedule.plan.yaml'}"
    return CliRunner().invoke(main, [str(csv), output, *arguments])


def test_a_schedule_becomes_a_plan_that_can_be_shown_and_exported_again(tmp_path: Path) -> None:
    result = run(tmp_path, ONE_F_ONE_B, "--forward-seconds=2", "--backward-seconds=3,4")
    assert result.exit_code == 0, result.output
    assert "step      17 s" in result.output
    path = tmp_path / "schedule.plan.yaml"
    plan = read_plan(path)
    assert check(plan).passed
    assert plan.schedule is Schedule.CUSTOM
    assert plan.prediction is not None
    assert plan.prediction.step_seconds == pytest.approx(2 + 2 + 4 + 2 + 4 + 3)
    again = tmp_path / "again.csv"
    assert CliRunner().invoke(show, [str(path), f"--csv={again}"]).exit_code == 0
    assert again.read_text() == ONE_F_ONE_B


def test_a_cluster_and_sizes_make_transfers_cost_time(tmp_path: Path) -> None:
    steps = []
    for arguments in ([], ["--cluster=a100-80", "--tensor-size=4GB", "--parameters=1000"]):
        result = run(tmp_path, ONE_F_ONE_B, *arguments)
        assert result.exit_code == 0, result.output
        prediction = read_plan(tmp_path / "schedule.plan.yaml").prediction
        assert prediction is not None
        steps.append(prediction.step_seconds)
    assert steps[1] > steps[0]


def test_a_schedule_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    result = run(tmp_path, "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    assert result.exit_code == 1
    assert "rule 4" in result.output
    assert "breaks rule" in result.stderr
    assert not (tmp_path / "schedule.plan.yaml").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("0F0,0X0\n", [], "row 1 (rank 0), column 2: '0X0' is no action"),
        (ONE_F_ONE_B, ["--forward-seconds=1,2,3"], "3 numbers of forward seconds for 2 stages"),
        (ONE_F_ONE_B, ["--forward-seconds=one"], "no list of numbers"),
        (ONE_F_ONE_B, ["--forward-seconds=nan"], "no duration"),
        (ONE_F_ONE_B, ["--weight-seconds=-1"], "no duration"),
        (ONE_F_ONE_B, ["--tensor-size=big"], "not a number of bytes"),
        (ONE_F_ONE_B, [f"--tensor-size={'9' * 400}GB"], "more than any memory"),
        (ONE_F_ONE_B, ["--forward-seconds=999999999"], "a step of 3000000003 s"),
        ("0B0\n", [], "has no forward"),
        (ONE_F_ONE_B, ["--cluster=a1000"], "unknown cluster 'a1000'"),
    ],
)
def test_a_wrong_input_is_named(
    text: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run(tmp_path, text, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "schedule.plan.yaml").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b",,,,\n,,\n", b"0F0,0B0\n\n1F0,1B0\n", b"999999999999F0\n", b"999999999F0\n",
        b"-1F0\n", b"0F999999999,0B999999999\n", b"0F0,0F0,0B0\n", b'"0F0,0B0\n',
        b'"' + b"x" * 200_000, b"0F0\x00,0B0\n", b"\xff0F0", ONE_F_ONE_B.encode("utf-16"),
        b"(0F0;)OVERLAP_F_B,0B0\n", b"()OVERLAP_F_B", b"\xd9\xa0F\xd9\xa0", b"0UNSHARD\n",
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_in_words(content: bytes, tmp_path: Path) -> None:
    csv = tmp_path / "schedule.csv"
    csv.write_bytes(content)
    result = CliRunner().invoke(main, [str(csv), f"--output={tmp_path / 'x.plan.yaml'}"])
    assert result.exit_code == 2
    assert str(csv) in result.stderr
    assert "try: " in result.stderr
    assert list(tmp_path.iterdir()) == [csv]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_spreadsheets_write_is_read(mark: str, line_end: str, tmp_path: Path) -> None:
    csv = tmp_path / "schedule.csv"
    csv.write_bytes((mark + ONE_F_ONE_B.replace("\n", line_end)).encode())
    path = tmp_path / "schedule.plan.yaml"
    result = CliRunner().invoke(main, [str(csv), f"--output={path}"])
    assert result.exit_code == 0, result.output
    assert read_plan(path).num_stages == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0," * 1_000_001, "more than 1000000 actions"),
        ("0F0,0B0\n" * 8193, "8193 rows, more than 8192 ranks"),
        ("," * 33_000_000, "33000000 bytes, more than"),
    ],
    ids=["actions", "ranks", "bytes"],
)
def test_what_is_too_large_is_refused_early(text: str, message: str, tmp_path: Path) -> None:
    result = run(tmp_path, text)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "none.csv"), f"--output={tmp_path / 'x.plan.yaml'}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "none.csv: No such file" in result.stderr


def test_renumbered_micro_batches_are_told(tmp_path: Path) -> None:
    result = run(tmp_path, "0F0,0F1,0B1,0B0\n")
    assert result.exit_code == 0, result.output
    assert "micro-batches have new numbers" in result.output
