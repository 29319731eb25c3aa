"""`lga-run --compile`: what a user types, sees, and gets."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import command
from planned import Chain, model_of, plan_of
from stepping import batches
from torch import nn
from training import EXAMPLES, even_plan

import runtime
from planner.cli.plan import main as lga_plan
from planner.plan.file import write_plan
from planner.plan.types import PlanOptions
from runtime.launch import main

MODEL = str(EXAMPLES / "mlp.py")


@pytest.mark.parametrize("num_pipeline_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_compiled_run_leaves_the_same_bits(num_pipeline_ranks: int, tmp_path: Path) -> None:
    made = even_plan(
        "mlp", num_pipeline_ranks=num_pipeline_ranks, stages_per_rank=2, num_micro_batches=2
    )
    write_plan(made, tmp_path / "a.plan.yaml")
    words = ("lga-run", "a.plan.yaml", MODEL, "--steps", "4")
    eager = command(tmp_path, *words, "--save", "eager.pt")
    assert eager.returncode == 0, eager.stderr
    assert "compiled" not in eager.stdout
    found = command(tmp_path, *words, "--save", "compiled.pt", "--verify", "--compile=aot_eager")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr == ""
    assert "compiled with aot_eager: " in found.stdout
    assert "verify: passed" in found.stdout
    assert "the predictions are of stages that run eagerly" in found.stdout
    assert "step time" in found.stdout
    assert "peak memory, pipeline rank" in eager.stdout
    assert "peak memory, pipeline rank" not in found.stdout
    mine, plain = (
        torch.load(tmp_path / name, weights_only=True) for name in ("compiled.pt", "eager.pt")
    )
    assert mine.keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in mine.items())


def test_what_is_not_compiled_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "def build_model():\n"
        "    layers = [torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4)]\n"
        "    return torch.nn.Sequential(*layers)\n"
        "def example_batch(batch_size):\n"
        "    return {'input': torch.randn(batch_size, 4)}\n"
        "def loss_fn(output, batch):\n"
        "    return output.square().mean()\n"
    )
    planned = CliRunner().invoke(lga_plan, [
        "model.py", "--gpus", "2", "--cluster", "cpu", "--batch-size", "4",
        "--pipeline-ranks", "2", "--micro-batches", "2", "--schedule", "layered",
        "--time-limit", "5", "--output", "a.yaml",
    ])  # fmt: skip
    assert planned.exit_code == 0, planned.output
    found = command(tmp_path, "lga-run", "a.yaml", "model.py", "--steps=2", "--compile=aot_eager")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("not compiled: ") == 1
    assert "its random operators are keyed one by one as they are called" in found.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--compile", "a.plan.yaml", MODEL), "'a.plan.yaml' is no backend"),
        (("a.plan.yaml", MODEL, "--compile=inducter"), "did you mean 'inductor'?"),
    ],
    ids=["swallowed", "misspelt"],
)
def test_a_wrong_backend_is_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(even_plan("mlp"), tmp_path / "a.plan.yaml")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_a_script_is_warned_of_what_is_not_compiled() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))))
    made = plan_of(model_file, (0, 2, 5), options=PlanOptions(deadline_seconds=20))
    given = batches(made, model_file, 0)[0]
    with (
        pytest.warns(UserWarning, match="not compiled: stage 0, stage 1"),
        runtime.connect(
            made, model_file.build_model, loss_fn=model_file.loss_fn, compile_backend="aot_eager"
        ) as executor,
    ):
        compiled = executor.step(given).loss
    with runtime.connect(made, model_file.build_model, loss_fn=model_file.loss_fn) as executor:
        assert executor.step(given).loss == compiled
