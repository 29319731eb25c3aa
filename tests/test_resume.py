"""A run that stops and goes on under another plan, through the command line."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import command
from stepping import on_every_rank
from training import EXAMPLES, even_plan, example, train_by_plan

from planner.model_file import ModelFile
from planner.plan.file import write_plan
from planner.plan.types import Plan
from runtime.data import Batches, Position
from runtime.executor import Executor
from runtime.launch import main

MODEL = str(EXAMPLES / "mlp.py")


def lga_run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return command(folder, "lga-run", *words)


def two_ranks() -> Plan:
    return even_plan(
        "mlp", num_pipeline_ranks=2, stages_per_rank=2, num_micro_batches=3, recompute=True
    )


def one_rank() -> Plan:
    return even_plan("mlp", stages_per_rank=3, num_micro_batches=3, offload_state=True)


def test_a_run_goes_on_under_another_plan_bit_for_bit(tmp_path: Path) -> None:
    write_plan(two_ranks(), tmp_path / "two.plan.yaml")
    write_plan(one_rank(), tmp_path / "one.plan.yaml")
    words = ("--steps", "3", "--save-every", "2", "--seed", "7")
    first = lga_run(tmp_path, "two.plan.yaml", MODEL, *words)
    assert first.returncode == 0, first.stderr
    assert "checkpoint written to checkpoints/step-000002" in first.stdout
    assert "checkpoint written to checkpoints/step-000003" in first.stdout  # the last one
    words = ("--steps", "5", "--resume", "checkpoints", "--save", "weights.pt")
    second = lga_run(tmp_path, "one.plan.yaml", MODEL, *words)
    assert second.returncode == 0, second.stderr
    assert "resumed after step 3 from checkpoints/step-000003" in second.stdout
    assert "step 4/5" in second.stdout
    assert "step 3/5" not in second.stdout
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    plan = two_ranks()
    plan = replace(plan, options=replace(plan.options, seed=7))
    expected = train_by_plan(example("mlp")[0], plan, num_steps=5).state
    assert expected.keys() == trained.keys()
    assert all(torch.equal(trained[key], value) for key, value in expected.items())


def test_what_cannot_be_resumed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_plan(one_rank(), tmp_path / "one.plan.yaml")
    path = str(tmp_path / "one.plan.yaml")
    result = CliRunner().invoke(main, [path, MODEL, "--resume", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "there is nothing at" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "2"), "was written after 2 steps, and --steps is 2"),
        (("--seed", "9"), "is of a run with seed 0"),
        (("--verify",), "--resume has none"),
    ],
)
def test_options_that_contradict_a_checkpoint_are_refused(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    write_plan(one_rank(), tmp_path / "one.plan.yaml")
    batches = Batches(example("mlp")[0], one_rank())

    def run(executor: Executor) -> None:
        for step in range(2):
            executor.step(batches.batch(step, 0))
        executor.save(tmp_path / "mine")

    on_every_rank(one_rank(), example("mlp")[0], run)
    command = [str(tmp_path / "one.plan.yaml"), MODEL, "--resume", str(tmp_path / "mine"), *words]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize("size", [5, 6, 7])
def test_data_goes_on_where_it_stopped(size: int) -> None:
    """Each epoch sees a sample once at most, whatever the steps took before and after."""

    def batches(plan: Plan, start: Position | None = None) -> Batches:
        return Batches(numbered(20), plan, start)

    small = even_plan("mlp", num_micro_batches=3)
    before = batches(small)
    where = before.position(2)
    assert (where.epoch, where.sample) == (0, 12)
    same = batches(small, where)
    for step in range(2, 9):
        assert torch.equal(same.batch(step, 0)["index"], before.batch(step, 0)["index"])
    other = replace(small, num_micro_batches=size, micro_batch_size=1)
    after = batches(other, where)
    seen = [before.batch(step, 0)["index"] for step in range(2)]
    seen += [after.batch(step, 0)["index"] for step in range(2, 2 + 8 // size)]
    together = torch.cat(seen)
    assert len(together.unique()) == len(together)
    assert after.position(2 + 8 // size).epoch == 1


def numbered(length: int) -> ModelFile:
    """A dataset whose samples say which they are."""
    dataset = [{"index": torch.tensor(number)} for number in range(length)]
    return replace(example("mlp")[0], build_dataset=lambda: dataset)
