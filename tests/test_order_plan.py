"""Orders that no family's rule makes, from the command line to what they compute."""

from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from commands import command
from planned import Chain, assert_same, model_of, traced
from synthetic import chain_cluster
from torch import nn

from planner.check import check
from planner.cli.check import main as check_command
from planner.cli.plan import main as plan_command
from planner.lower import lower
from planner.measure import measure
from planner.order import find_order
from planner.plan.file import read_plan
from planner.plan.types import Plan, PlanOptions
from planner.schedule import Order
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve.types import Placement

MODEL = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)))

def example_batch(batch_size):
    return {"input": torch.zeros(batch_size, 64), "target": torch.zeros(batch_size, 64)}

def loss_fn(output, batch):
    return nn.functional.mse_loss(output, batch["target"])
"""
PLACED = ("--gpus", "4", "--replicas", "1", "--pipeline-ranks", "4", "--stages-per-rank", "2",
          "--micro-batches", "6", "--micro-batch-size", "64", "--no-recompute",
          "--no-offload-state", "--no-offload-inputs", "--cluster", "cluster.yaml",
          "--time-limit", "2")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "cluster.yaml").write_text(
        "name: four processes\n"
        "hosts:\n"
        "  - device: v100-32\n"
        "    count: 4\n"
        "network: loopback\n"
        "backend: gloo\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: click.Command, *arguments: str) -> Result:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def plan(*arguments: str) -> Result:
    return run(plan_command, "small.py", *PLACED, *arguments)


def tight_plan(folder: Path) -> Plan:
    """In three quarters of the memory above the state that the layered order would take."""
    made = plan("--schedule", "layered")
    assert made.exit_code == 0, made.output
    layered = read_plan(folder / "small.plan.yaml")
    assert layered.prediction is not None
    peaks = layered.prediction.peak_bytes
    state = max(sum(b.num_bytes for b in rank if b.name.startswith(("weights", "moments", "sum")))
                for rank in layered.buffers)  # fmt: skip
    limit = state + (max(peaks) - state) * 3 // 4
    made = plan("--schedule", "best", "--memory-limit", f"{limit}B")
    assert made.exit_code == 0, made.output
    for words in ("orders of compute", "bound of this placement", "too much", "10 of 10 rules"):
        assert words in made.output
    found = read_plan(folder / "small.plan.yaml")
    assert found.prediction is not None
    assert found.prediction.memory_limit_bytes == limit
    assert max(found.prediction.peak_bytes) <= limit
    return found


def test_best_order_in_little_memory(folder: Path) -> None:
    found = tight_plan(folder)
    assert found.schedule is Schedule.CUSTOM
    assert check(found).passed
    checked = run(check_command, "small.plan.yaml")
    assert checked.exit_code == 0, checked.output
    assert "custom does not claim it" in checked.output


def test_best_layered_order(folder: Path) -> None:
    made = plan("--schedule", "best-layered")
    assert made.exit_code == 0, made.output
    assert "order     " in made.output
    assert "interleaved" not in made.output
    assert check(read_plan(folder / "small.plan.yaml")).passed


@pytest.mark.parametrize("question", [("--explain",), ("--what-if", "memory=2GB")])
def test_questions_about_families_are_refused(folder: Path, question: tuple[str, ...]) -> None:
    asked = plan("--schedule", "best", *question)
    assert asked.exit_code == 2
    assert "--schedule best" in asked.output
    assert not (folder / "small.plan.yaml").exists()


@pytest.mark.parametrize("recompute", [False, True])
def test_computes_what_plain_accumulation_does(recompute: bool) -> None:
    """Three steps of an order of our own, bitwise."""
    model = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)), 7))
    graph, profile = traced(model).layer_graph(2), measure(traced(model), 2)

    @cache
    def planned(placement: Placement, order: Order | None) -> tuple[Plan, Simulation]:
        options = PlanOptions(deadline_seconds=20)
        made = lower(graph, profile, chain_cluster(2), placement, options, order=order)
        return made, simulate(made)

    placement = Placement(
        num_replicas=1,
        num_pipeline_ranks=2,
        boundaries=(0, 1, 3, 5, len(graph.layers)),
        stage_ranks=(0, 1, 0, 1),
        micro_batch_size=2,
        num_micro_batches=6,
        partition=0,
        recompute=(recompute,) * 4,
    )
    _, layered = planned(placement, None)
    more = 2000 if recompute else -500
    limits = [peak + more for peak in layered.peak_bytes]
    found = find_order(planned, placement, limits, families=False, time_limit_seconds=5)
    assert found is not None
    assert found.best.plan.schedule is Schedule.CUSTOM
    assert check(found.best.plan).passed
    assert_same(model, found.best.plan)


@pytest.mark.slow
def test_best_order_runs_in_processes(folder: Path) -> None:
    tight_plan(folder)
    done = command(folder, "lga-run", "small.plan.yaml", "small.py", "--steps", "2", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "22 tensors compared" in done.stdout
    assert "22 bitwise equal" in done.stdout
