"""lga-run: starts sound runs only, ends all ranks, and says which rank failed and how."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.lower import lower
from planner.model_file import fingerprint, load_model_file
from planner.plan.file import write_plan
from planner.plan.types import Plan, PlanOptions
from runtime.launch import main
from runtime.options import RunOptions, run_options

MODEL = str(Path(__file__).parent / "launch_model.py")
CULPRIT = "rank 1 (pipeline rank 1, replica 0)"


def two_rank_plan() -> Plan:
    """For launch_model.py: one layer on each of two pipeline ranks."""
    graph = chain_graph(2)
    plan = lower(
        graph,
        chain_profile(graph),
        chain_cluster(2),
        chain_placement(2, 2, 2),
        PlanOptions(deadline_seconds=60, heartbeat_seconds=2),
    )
    return replace(plan, fingerprint=fingerprint(load_model_file(MODEL).build_model()))


@pytest.fixture
def plan_path(tmp_path: Path) -> str:
    write_plan(two_rank_plan(), tmp_path / "chain.plan.yaml")
    return str(tmp_path / "chain.plan.yaml")


def start(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lga_run(plan_path: str, *options: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from runtime.launch import main; main()"]
    return start([*command, plan_path, MODEL, *options], **environment)


def in_process(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "\n  try: " in result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    assert_refused(in_process(str(tmp_path / "no.plan.yaml"), MODEL), "no.plan.yaml")


def test_a_missing_model_is_refused(plan_path: str) -> None:
    assert_refused(in_process(plan_path, "launch_modle.py"), "launch_modle.py")


def test_another_model_is_refused(plan_path: str, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "import torch\n"
        "def build_model(): return torch.nn.Linear(2, 1)\n"
        "def example_batch(batch_size): return {}\n"
    )
    assert_refused(in_process(plan_path, str(other)), "made for another model", "other.py")


def test_a_model_that_cannot_be_built_is_refused(plan_path: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "def build_model(): raise ValueError('teapot')\ndef example_batch(batch_size): return {}\n"
    )
    assert_refused(
        in_process(plan_path, str(broken)),
        "build_model() of broken raised ValueError: teapot",
        "broken.py, line 1",
    )


def test_inside_another_launcher_it_is_refused(
    plan_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(in_process(plan_path, MODEL), "torchrun ... -m runtime", "WORLD_SIZE is 2")


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(),
        RunOptions(
            num_steps=3,
            verify=True,
            save_path=Path("a b.pt"),
            timeline_path=Path("the step.json"),
            log_every=2,
            seed=7,
            deadline_seconds=0.1 + 0.2,
        ),
    ],
)
def test_options_pass_through_a_command_line(options: RunOptions) -> None:
    found: list[RunOptions] = []

    @click.command()
    @run_options
    def command(**words: object) -> None:
        found.append(RunOptions(**words))  # type: ignore[arg-type]

    assert CliRunner().invoke(command, options.arguments()).exit_code == 0
    assert found == [options]


def test_options_override_the_plan() -> None:
    plan = two_rank_plan()
    assert RunOptions().adjust(plan) == plan
    adjusted = RunOptions(seed=5, deadline_seconds=1.5).adjust(plan)
    assert adjusted.options == replace(plan.options, seed=5, deadline_seconds=1.5)


@pytest.mark.slow
def test_a_sound_run_ends_well(plan_path: str, tmp_path: Path) -> None:
    saved = tmp_path / "trained.pt"
    process = lga_run(plan_path, "--steps=3", f"--save={saved}")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "step 3/3" in output
    assert saved.is_file()


@pytest.mark.parametrize(
    ("failure", "last_words"),
    [
        ("kill", f"error: {CULPRIT} was ended by SIGKILL\n  try: "),
        pytest.param("stop", f"error: {CULPRIT} on host ", marks=pytest.mark.slow),
        pytest.param(
            "exit",
            f"error: {CULPRIT} failed: the model or data called sys.exit(3)\n  ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "_exit",
            f"error: {CULPRIT} ended with exit code 4 and no error\n  try: ",
            marks=pytest.mark.slow,
        ),
        ("raise", f"error: {CULPRIT} failed: ValueError: the loss is a teapot\n"),
    ],
    ids=["kill", "stop", "exit", "_exit", "raise"],
)
def test_a_failed_rank_is_named(failure: str, last_words: str, plan_path: str) -> None:
    process = lga_run(plan_path, "--steps=5", TEST_FAILURE=failure)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("error: ") == 1
    assert errors.startswith(last_words), errors
    if failure in ("raise", "exit"):
        assert "launch_model.py, line " in errors


def test_an_interrupt_ends_all_ranks(plan_path: str) -> None:
    process = lga_run(plan_path, "--steps=5", TEST_FAILURE="sleep")
    assert process.stdout is not None
    while "step 2/5" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # to the end of the last process that writes
    assert process.returncode == 130
    assert errors == "error: ended by SIGINT; all ranks are down\n"


def test_another_world_size_under_torchrun(plan_path: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = start([*torchrun, "--nproc-per-node=3", "-m", "runtime", plan_path, MODEL])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    words = "error: the launcher started 3 processes, but the plan needs 2"
    assert errors.count(words) == 1
    assert "exitcode  : 2" in errors
