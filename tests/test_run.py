"""From a model file to trained weights, as a user does it: real commands, real processes, gloo."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import command
from training import EXAMPLES, even_plan, example, train_by_plan

from planner.cli.plan import main as lga_plan
from planner.model_file import load_model_file
from planner.plan.file import read_plan, write_plan
from planner.plan.types import Opcode, PlanOptions
from planner.schedules import Schedule
from runtime.build import build_model


def plan(folder: Path, model: str, *options: str, num_hosts: int = 1) -> Path:
    """Plan for processes of this machine; the cluster is given so that nothing is measured.

    In this process: starting the command takes longer than what it does.
    """
    (folder / "cluster.yaml").write_text(
        "name: four processes\n"
        "hosts:\n"
        "  - device: v100-32\n"
        f"    count: {4 // num_hosts}\n"
        f"    copies: {num_hosts}\n"
        "network: loopback\n"
        "backend: gloo\n"
    )
    output = folder / "a.plan.yaml"
    words = ("--cluster", str(folder / "cluster.yaml"), "--output", str(output))
    result = CliRunner().invoke(lga_plan, [model, *words, "--time-limit", "5", *options])
    assert result.exit_code == 0, result.output
    return output


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", "--gpus 2 --pipeline-ranks 2 --stages-per-rank 2 --micro-batches 3"),
        ("resnet", "--gpus 2 --replicas 2 --partition 3 --stages-per-rank 3 --recompute"),
        pytest.param(
            "unet",
            "--gpus 4 --pipeline-ranks 4 --stages-per-rank 2 --recompute",
            marks=pytest.mark.slow,
        ),
        (
            "mlp",
            "--gpus 4 --pipeline-ranks 2 --replicas 2 --partition 1 --clip-norm 1 --check-finite",
        ),
        ("mlp", "--gpus 1 --stages-per-rank 1 --micro-batches 1"),
        pytest.param(
            "mlp",
            "--gpus 2 --pipeline-ranks 2 --precision bfloat16 --keep-float32 *.bias",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gpt",
            "--gpus 4 --pipeline-ranks 2 --partition 2 --precision float16 --clip-norm 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_plan_verify_train_save(name: str, options: str, tmp_path: Path) -> None:
    model = str(EXAMPLES / f"{name}.py")
    path = plan(tmp_path, model, "--batch-size", "12", *options.split())
    ends = {i.opcode for i in read_plan(path).programs[-1]} & {Opcode.CHECK_FINITE, Opcode.CLIP}
    assert len(ends) == (2 if "--clip-norm" in options else 0)
    words = ("--verify", "--steps", "4", "--save", "weights.pt")
    result = command(tmp_path, "lga-run", str(path), model, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: passed" in result.stdout
    assert len(re.findall(r"step \d/4  loss \d+\.\d+  [\d.]+ samples/s", result.stdout)) == 3
    for rank in range(read_plan(path).num_pipeline_ranks):
        assert f"peak memory, pipeline rank {rank}" in result.stdout
    assert "step time" in result.stdout
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    fresh = load_model_file(model).build_model()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    fresh.load_state_dict(trained)
    assert any(not torch.equal(before[key], value) for key, value in trained.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.plan.yaml",
        "cluster.yaml",
        "weights.pt",
    ]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"schedule": Schedule.ZERO_BUBBLE, "offload_state": True}, marks=pytest.mark.slow
        ),
        {"stages_per_rank": 2, "num_replicas": 2, "partition": 3, "offload_inputs": True},
        pytest.param(
            {"stages_per_rank": 2, "num_replicas": 2, "partition": 2, "offload_state": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_instruction_over_gloo_is_what_it_is_between_threads(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    options = PlanOptions(deadline_seconds=60, check_finite=True, clip_norm=0.5, save=True)
    made = even_plan(
        "mlp", num_pipeline_ranks=2, num_micro_batches=3, recompute=True, options=options, **layout
    )
    write_plan(made, tmp_path / "a.plan.yaml")
    model = str(EXAMPLES / "mlp.py")
    words = ("--verify", "--steps", "3", "--save", "weights.pt")
    result = command(tmp_path, "lga-run", "a.plan.yaml", model, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: passed" in result.stdout
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected = train_by_plan(example("mlp")[0], made, num_steps=3).state
    assert expected.keys() == trained.keys()
    assert all(torch.equal(trained[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("partition", [2, 3])
def test_state_divided_inside_hosts_trains(partition: int, tmp_path: Path) -> None:
    """Four processes on two hosts; what they leave goes on where nothing is divided."""
    model = str(EXAMPLES / "mlp.py")
    shape = ("--gpus", "4", "--replicas", "4", "--batch-size", "16", "--micro-batches", "2")
    words = ("--partition", str(partition), "--partition-within", "host", "--clip-norm", "1")
    path = plan(tmp_path, model, *shape, *words, num_hosts=2)
    made = read_plan(path)
    assert (made.partition, made.partition_group_size) == (partition, 2)
    words = ("--verify", "--steps", "3", "--save", "weights.pt", "--save-every", "2")
    result = command(tmp_path, "lga-run", str(path), model, *words, "--checkpoints", "kept")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: passed" in result.stdout
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected = train_by_plan(example("mlp")[0], made, num_steps=3).state
    assert all(torch.equal(trained[key], value) for key, value in expected.items())
    whole = plan(tmp_path, model, *shape, "--partition", "0", "--clip-norm", "1", num_hosts=2)
    words = ("--steps", "3", "--save", "others.pt", "--resume", "kept/step-000002")
    result = command(tmp_path, "lga-run", str(whole), model, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    others = torch.load(tmp_path / "others.pt", weights_only=True)
    for key, value in trained.items():
        torch.testing.assert_close(others[key], value, rtol=1e-5, atol=1e-6)


def test_torchrun_trains_the_same(tmp_path: Path) -> None:
    model = str(EXAMPLES / "mlp.py")
    options = ("--gpus", "2", "--batch-size", "8", "--pipeline-ranks", "2")
    path = plan(tmp_path, model, *options)
    words = ("--standalone", "--nproc-per-node", "2", "-m", "runtime", str(path), model)
    theirs = command(tmp_path, "torchrun", *words, "--steps", "3", "--save", "a.pt")
    assert theirs.returncode == 0, theirs.stderr
    trained = torch.load(tmp_path / "a.pt", weights_only=True)
    expected = train_by_plan(example("mlp")[0], read_plan(path), num_steps=3).state
    assert expected.keys() == trained.keys()
    assert all(torch.equal(trained[key], value) for key, value in expected.items())


def test_verify_fails_loudly_where_the_model_cannot_be_reproduced(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import random\n"
        "import torch\n"
        "class Noisy(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * (1 + random.random())\n"
        "def build_model():\n"
        "    return torch.nn.Sequential(Noisy(4, 4), Noisy(4, 4))\n"
        "def example_batch(batch_size):\n"
        "    return {'input': torch.randn(batch_size, 4)}\n"
        "def loss_fn(output, batch):\n"
        "    return output.square().mean()\n"
    )
    path = plan(tmp_path, str(tmp_path / "model.py"), "--gpus", "2", "--pipeline-ranks", "2")
    result = command(tmp_path, "lga-run", str(path), "model.py", "--verify")
    assert result.returncode == 1
    assert "differ from plain accumulation; the worst is" in result.stderr
    assert "outside torch" in result.stderr
    assert "Traceback" not in result.stderr


def test_steps_that_are_not_finite_are_said_and_change_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\n"
        "def build_model():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "def example_batch(batch_size):\n"
        "    return {'input': torch.full((batch_size, 4), torch.nan)}\n"
        "def loss_fn(output, batch):\n"
        "    return output.square().mean()\n"
    )
    options = ("--gpus", "2", "--pipeline-ranks", "2", "--clip-norm", "1.0", "--check-finite")
    path = plan(tmp_path, str(model), *options)
    words = ("--steps", "3", "--save", "weights.pt")
    result = command(tmp_path, "lga-run", str(path), "model.py", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    for step in (1, 2, 3):
        assert f"step {step}/3  loss nan" in result.stdout
        assert f"step {step}: a gradient is not finite, nothing was updated" in result.stdout
    assert result.stderr == ""
    seed = read_plan(path).options.seed
    fresh = build_model(load_model_file(str(model)), seed, torch.device("cpu")).state_dict()
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(trained[key], value) for key, value in fresh.items())
