"""lga-plan, lga-check and lga-show from the command line, on a small real model."""

from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from planner.check import check
from planner.cli.check import main as check_command
from planner.cli.plan import main as plan_command
from planner.cli.show import main as show_command
from planner.cluster import resolve_cluster
from planner.errors import UsageError
from planner.model_file import load_model_file
from planner.pipeline import make_plan
from planner.plan.file import read_plan, write_plan
from planner.plan.types import Opcode

MODEL = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)))

def example_batch(batch_size):
    return {"input": torch.zeros(batch_size, 8), "target": torch.zeros(batch_size, 8)}

def loss_fn(output, batch):
    return nn.functional.mse_loss(output, batch["target"])

def build_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: click.Command, *arguments: str) -> Result:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def plan(*arguments: str) -> Result:
    return run(plan_command, "small.py", "--cluster", "a100-80", "--time-limit", "3", *arguments)


def test_plan_check_show(folder: Path) -> None:
    made = plan("--gpus", "4", "--replicas", "2", "--pipeline-ranks", "2", "--micro-batches", "2")
    assert made.exit_code == 0, made.output
    for words in ("no --global-batch given: 32 samples", "placement", "bubble", "gap", "uniform",
                  "greedy", "10 of 10 rules hold",
                  "plan      written to small.plan.yaml"):  # fmt: skip
        assert words in made.output
    written = read_plan(folder / "small.plan.yaml")
    assert (written.num_replicas, written.num_pipeline_ranks) == (2, 2)
    assert written.num_micro_batches == 2
    assert written.global_batch_size == 32
    assert written.options.optimizer_slots == 1
    assert written.prediction is not None
    assert written.prediction.step_seconds > 0
    assert check(written).passed
    assert run(check_command, "small.plan.yaml").exit_code == 0
    shown = run(show_command, "small.plan.yaml")
    assert shown.exit_code == 0
    assert "rank 1" in shown.output
    assert "FORWARD" in shown.output
    for result in (made, shown):
        assert f"schedule  {written.schedule}" in result.output


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_a_plan_of_another_schedule_has_a_bound_too(folder: Path, schedule: str) -> None:
    made = plan("--gpus", "2", "--pipeline-ranks", "2", "--batch-size", "8", "--schedule", schedule)
    assert made.exit_code == 0, made.output
    assert "bound of every schedule" in made.output
    prediction = read_plan(folder / "small.plan.yaml").prediction
    assert prediction is not None
    assert prediction.bound_seconds is not None
    assert 0.5 * prediction.step_seconds < prediction.bound_seconds <= prediction.step_seconds
    gap = 1 - prediction.bound_seconds / prediction.step_seconds
    assert f"gap {gap:.2%}" in made.output
    for command, words in (
        (check_command, f"the gap to its bound is {gap:.2%}"),
        (show_command, f"schedule  {schedule}"),
    ):
        result = run(command, "small.plan.yaml")
        assert result.exit_code == 0
        assert words in result.output


def test_one_device(folder: Path) -> None:
    made = plan("--gpus", "1", "--batch-size", "1", "--output", "one.yaml")
    assert made.exit_code == 0, made.output
    assert read_plan(folder / "one.yaml").world_size == 1


def test_the_same_command_writes_the_same_plan(folder: Path) -> None:
    arguments = ("--gpus", "2", "--pipeline-ranks", "2", "--batch-size", "8", "--time-limit", "60")
    plan(*arguments, "--output", "one.yaml")
    plan(*arguments, "--output", "other.yaml")
    assert (folder / "one.yaml").read_bytes() == (folder / "other.yaml").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "0"), "0 is not in the range"),
        (("--gpus", "two"), "not a valid integer"),
        (("--gpus", "2", "--cluster", "a100-88"), "unknown cluster"),
        (("--gpus", "2", "--memory-limit", "lots"), "--memory-limit: 'lots' is not a number of"),
        (("--gpus", "2", "--pipeline-ranks", "9"), "--pipeline-ranks 9 need 9 devices"),
        (("--gpus", "1", "--schedule", "gpipe"), "several ranks, but --gpus is 1"),
        (("--gpus", "2", "--schedule", "1f1b", "--replicas", "2"), "--gpus 2 leave one for each"),
        (
            ("--gpus", "2", "--schedule", "zb-h1", "--pipeline-ranks", "1"),
            "several ranks, but --pipeline-ranks is 1",
        ),
        (
            ("--gpus", "2", "--schedule", "gpipe", "--stages-per-rank", "2"),
            "--schedule gpipe takes one stage per rank, not --stages-per-rank 2",
        ),
        (
            ("--gpus", "2", "--schedule", "hybrid", "--stages-per-rank", "1"),
            "--schedule hybrid takes several stages per rank",
        ),
        (
            ("--gpus", "2", "--schedule", "plain", "--pipeline-ranks", "2"),
            "--schedule plain is for one pipeline rank",
        ),
        (
            ("--gpus", "2", "--schedule", "1f1b", "--offload-inputs"),
            "--offload-inputs goes with the layered schedule alone",
        ),
        (
            (
                "--gpus",
                "2",
                "--schedule",
                "interleaved",
                "--pipeline-ranks",
                "2",
                "--micro-batches",
                "3",
            ),
            "--micro-batches 3 are no multiple of --pipeline-ranks 2",
        ),
        (("--gpus", "2", "--partition", "4"), "partition"),
        (("--gpus", "4", "--partition-within", "hosts"), "partition-within"),
        (("--gpus", "4", "--partition-within", "0"), "partition-within"),
        (
            ("--gpus", "4", "--replicas", "4", "--partition-within", "3"),
            "--replicas 4 do not divide into groups of --partition-within 3",
        ),
        (("--gpus", "4", "--partition-within", "8"), "--gpus is 4"),
        (("--gpus", "4", "--partition-within", "2", "--partition", "0"), "divides nothing"),
        (("--gpus", "4", "--partition-within", "1", "--partition", "3"), "have it whole"),
        (
            (
                *("--gpus", "4", "--pipeline-ranks", "4"),
                *("--partition-within", "host", "--partition", "3"),
            ),
            "leave one replica",
        ),
        (
            ("--gpus", "16", "--replicas", "3", "--partition-within", "2", "--partition", "2"),
            "do not divide",
        ),
        (
            (
                *("--gpus", "3", "--batch-size", "3", "--pipeline-ranks", "1"),
                *("--partition-within", "2", "--partition", "2"),
            ),
            "no mesh of up to 3 devices serves a global batch of 3 samples with "
            "num pipeline ranks 1, partition 2, partition within 2",
        ),
        (("--gpus", "4", "--replicas", "3", "--pipeline-ranks", "2"), "replicas"),
        (("--gpus", "2", "--batch-size", "7", "--replicas", "2"), "7"),
        (("--gpus", "2", "--output", "missing/a.yaml"), "cannot write"),
    ],
)
def test_wrong_commands_exit_2_and_write_nothing(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(folder.glob("*.plan.yaml"))


def test_a_missing_model(folder: Path) -> None:  # noqa: ARG001
    result = run(plan_command, "smal.py", "--gpus", "1")
    assert result.exit_code == 2
    assert "did you mean small.py?" in result.output


def test_nothing_fits_exits_1_and_writes_nothing(folder: Path) -> None:
    result = plan("--gpus", "2", "--memory-limit", "100B")
    assert result.exit_code == 1, result.output
    assert "try:" in result.output
    assert not list(folder.glob("*.yaml"))


def test_check_refuses_what_is_no_plan(folder: Path) -> None:
    (folder / "a.yaml").write_text("hello: world\n")
    for path in ("a.yaml", "missing.yaml", "."):
        for command in (check_command, show_command):
            result = run(command, path)
            assert result.exit_code == 2
            assert "error:" in result.output


def test_check_prints_the_counterexample(folder: Path) -> None:
    plan("--gpus", "2", "--pipeline-ranks", "2", "--batch-size", "4")
    good = read_plan(folder / "small.plan.yaml")
    program = tuple(i for i in good.programs[0] if i.opcode is not Opcode.UPDATE)
    write_plan(replace(good, programs=(program, *good.programs[1:])), folder / "bad.yaml")
    result = run(check_command, "bad.yaml")
    assert result.exit_code == 1
    assert "BROKEN" in result.output
    assert "updated 0 times instead of 1" in result.output


def test_clipping_and_the_finite_check_stand_before_every_update(folder: Path) -> None:
    made = plan("--gpus", "4", "--pipeline-ranks", "2", "--clip-norm", "0.5", "--check-finite")
    assert made.exit_code == 0, made.output
    written = read_plan(folder / "small.plan.yaml")
    assert (written.options.clip_norm, written.options.check_finite) == (0.5, True)
    for program in written.programs:
        opcodes = [instruction.opcode for instruction in program]
        assert opcodes.index(Opcode.CLIP) < opcodes.index(Opcode.UPDATE)
        assert opcodes.count(Opcode.CHECK_FINITE) == 1


def test_the_state_is_divided_inside_hosts(folder: Path) -> None:
    """Of two hosts of eight devices each."""
    for options, groups in (
        (("--replicas", "16"), (16, 8)),
        (("--replicas", "16", "--partition-within", "4"), (16, 4)),
        (("--replicas", "16", "--partition-within", "16"), (16, 0)),
        (("--replicas", "8", "--pipeline-ranks", "1"), (8, 0)),
        (("--replicas", "16", "--partition-within", "1"), (16, 0)),
    ):
        within = () if "--partition-within" in options else ("--partition-within", "host")
        level = () if options[-2:] == ("--partition-within", "1") else ("--partition", "3")
        made = plan("--gpus", "16", "--batch-size", "32", *options, *within, *level)
        assert made.exit_code == 0, made.output
        written = read_plan(folder / "small.plan.yaml")
        assert (written.num_replicas, written.partition_group_size) == groups
        assert written.partition == (3 if level else 0)
        said = f"of groups of {groups[1]}, each with all of it" in " ".join(made.output.split())
        assert said == bool(groups[1])
        assert run(check_command, "small.plan.yaml").exit_code == 0


def test_no_host_has_two_replicas(folder: Path) -> None:
    (folder / "apart.yaml").write_text(
        "hosts:\n  - {device: a100-80, count: 1, copies: 4}\nnetwork: ethernet-100\n"
    )
    words = ("--gpus", "4", "--cluster", "apart.yaml", "--partition-within", "host")
    refused = plan(*words, "--partition", "3")
    assert refused.exit_code == 2, refused.output
    assert "partition 3, partition within host" in " ".join(refused.output.split())
    made = plan(*words)
    assert made.exit_code == 0, made.output
    assert read_plan(folder / "small.plan.yaml").partition == 0


def test_updates_do_not_wait_for_a_delayed_norm(folder: Path) -> None:
    made = plan("--gpus", "2", "--pipeline-ranks", "2", "--clip-norm", "0.5", "--clip-delayed")
    assert made.exit_code == 0, made.output
    written = read_plan(folder / "small.plan.yaml")
    assert written.options.clip_delayed
    for program in written.programs:
        opcodes = [instruction.opcode for instruction in program]
        assert opcodes.index(Opcode.CLIP) > max(
            i for i, o in enumerate(opcodes) if o is Opcode.UPDATE
        )
    assert run(check_command, "small.plan.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--clip-delayed",), "--clip-norm"),
        (("--clip-delayed", "--clip-norm", "1", "--check-finite"), "check_finite"),
    ],
)
def test_a_delayed_norm_needs_a_norm_and_no_check(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    refused = plan("--gpus", "2", *options)
    assert refused.exit_code == 2
    assert words in refused.output
    assert not list(folder.glob("*.plan.yaml"))


@pytest.mark.parametrize(
    "options", [("--gpus", "1"), ("--gpus", "2", "--replicas", "2", "--partition", "3")]
)
def test_updates_may_run_on_the_host(folder: Path, options: tuple[str, ...]) -> None:
    made = plan(*options, "--update-on", "host", "--batch-size", "4")
    assert made.exit_code == 0, made.output
    written = read_plan(folder / "small.plan.yaml")
    assert written.options.update_on_host
    assert written.offload_state
    updates = [i for p in written.programs for i in p if i.opcode is Opcode.UPDATE]
    assert {i.stream for i in updates} == {"host"}
    assert run(check_command, "small.plan.yaml").exit_code == 0
    assert run(show_command, "small.plan.yaml").exit_code == 0
    made = plan(*options, "--update-on", "device", "--batch-size", "4")
    assert made.exit_code == 0, made.output
    assert not read_plan(folder / "small.plan.yaml").options.update_on_host


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-offload-state",), "no offload of the state"),
        (("--replicas", "2", "--partition", "1"), "partition 1, whose weights"),
        (("--replicas", "2", "--partition", "2"), "partition 2, whose weights"),
        (("--schedule", "1f1b", "--pipeline-ranks", "2"), "--update-on host"),
        (("--schedule", "best"), "layered schedule alone, not with a search"),
    ],
)
def test_updates_on_the_host_need_the_state_there(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    refused = plan("--gpus", "2", "--update-on", "host", *options)
    assert refused.exit_code == 2, refused.output
    assert words in " ".join(refused.output.split())
    assert not list(folder.glob("*.plan.yaml"))


@pytest.mark.parametrize("norm", ["0", "-1", "nan", "inf", "much"])
def test_a_norm_is_a_finite_number_above_zero(folder: Path, norm: str) -> None:
    refused = plan("--gpus", "2", "--clip-norm", norm)
    assert refused.exit_code == 2
    assert "--clip-norm" in refused.output
    assert not list(folder.glob("*.plan.yaml"))


def test_the_same_from_python(folder: Path) -> None:
    model_file = load_model_file(str(folder / "small.py"))
    cluster = resolve_cluster("a100-80", 2)
    made = make_plan(model_file, num_devices=2, cluster=cluster, clip_norm=2.0, save=True).plan
    assert (made.options.clip_norm, made.options.save) == (2.0, True)
    assert any(i.opcode is Opcode.SAVE for i in made.programs[0])
    with pytest.raises(UsageError, match="clip_norm is nan"):
        make_plan(model_file, num_devices=2, cluster=cluster, clip_norm=float("nan"))


@pytest.mark.slow
def test_what_fits_only_just_is_found(folder: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "gpt.py"
    result = run(
        plan_command, str(example), "--gpus", "2", "--cluster", "a100-80", "--batch-size", "8",
        "--memory-limit", "8MB", "--schedule", "layered", "--output", str(folder / "gpt.plan.yaml"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
