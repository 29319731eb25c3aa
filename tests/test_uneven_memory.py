"""Devices with different memory: each pipeline rank has a limit of its own, from plan to check."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.check import check
from planner.cli.check import main as check_command
from planner.cli.plan import main as plan_command
from planner.errors import PlanFileError
from planner.plan.file import parse_plan, print_plan, read_plan
from planner.plan.types import Plan, Prediction

HOST = """
  - device: {name: %s, memory_bytes: %s, reserved_bytes: 0, peak_flops: {float32: 1e12},
             memory_bandwidth: 1e12}
    link: {name: bus, bandwidth: 1e10, latency_seconds: 1e-6}
    count: 1"""
CLUSTER = f"""
name: uneven
hosts:{HOST % ("small", "3.5e6")}{HOST % ("large", "1e9")}
network: {{name: lan, bandwidth: 1e10, latency_seconds: 1e-6}}
"""
MODEL = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])

def example_batch(batch_size):
    return {"input": torch.randn(batch_size, 256)}

def loss_fn(output, batch):
    return output.square().mean()
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """On one small and one large device."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "uneven.yaml").write_text(CLUSTER)
    arguments = ["model.py", "--gpus", "2", "--cluster", "uneven.yaml", "--batch-size", "8"]
    arguments += ["--pipeline-ranks", "2", "--no-offload-state", "--schedule", "layered"]
    made = CliRunner().invoke(plan_command, arguments)
    assert made.exit_code == 0, made.output
    return read_plan("model.plan.yaml")


def prediction_of(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def test_a_rank_may_fill_its_own_device(plan: Plan) -> None:
    prediction = prediction_of(plan)
    assert sorted(prediction.rank_limit_bytes) == [3_500_000, 1_000_000_000]
    assert prediction.memory_limit_bytes == 3_500_000
    assert max(prediction.peak_bytes) > prediction.memory_limit_bytes
    assert CliRunner().invoke(check_command, ["model.plan.yaml"]).exit_code == 0


def test_rule_7_a_rank_beyond_its_own_limit(plan: Plan) -> None:
    prediction = prediction_of(plan)
    for rank, peak in enumerate(prediction.peak_bytes):
        limits = list(prediction.rank_limit_bytes)
        limits[rank] = peak - 1
        tight = replace(plan, prediction=replace(prediction, rank_limit_bytes=tuple(limits)))
        assert {failure.number for failure in check(tight).failures} == {7}


def test_a_limit_for_each_rank_or_for_none(plan: Plan) -> None:
    odd = replace(plan, prediction=replace(prediction_of(plan), rank_limit_bytes=(1, 2, 3)))
    with pytest.raises(PlanFileError, match="3 limits of 2 ranks"):
        parse_plan(print_plan(odd))
