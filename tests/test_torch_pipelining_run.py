"""A plan's schedule in torch's own runtime, in real processes: the same gradients as ours."""

import json
import subprocess
import sys
from pathlib import Path

import pipelining_ranks
import pytest
import torch
from planned import plan_of
from torch import Tensor
from training import relative_rms, train_by_plan

from planner.export.torch_csv import CsvFormat, print_csv
from planner.model_file import model_from_functions
from planner.plan.types import Plan
from planner.schedules import Schedule
from runtime.build import build_model
from runtime.data import Batches

NUM_RANKS = 4
TOLERANCE = 1e-6

MODEL = model_from_functions(
    pipelining_ranks.build,
    pipelining_ranks.batch,
    loss_fn=lambda output, batch: pipelining_ranks.loss_of(output, batch["y"]),
)


@pytest.fixture(
    scope="module",
    params=[
        (Schedule.LAYERED, 8),
        pytest.param((Schedule.INTERLEAVED, 8), marks=pytest.mark.slow),
        pytest.param((Schedule.ZERO_BUBBLE, 4), marks=pytest.mark.slow),
    ],
    ids=lambda param: str(param[0]),
)
def plan(request: pytest.FixtureRequest) -> Plan:
    """8 layers on 4 ranks, 4 micro-batches."""
    schedule, num_stages = request.param
    layers_per_stage = pipelining_ranks.NUM_LAYERS // num_stages
    boundaries = tuple(range(0, pipelining_ranks.NUM_LAYERS + 1, layers_per_stage))
    return plan_of(
        MODEL, boundaries, num_pipeline_ranks=NUM_RANKS, num_micro_batches=4, schedule=schedule
    )


@pytest.fixture(scope="module")
def by_torch(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients by format and parameter."""
    folder = tmp_path_factory.mktemp("torch")
    weights = build_model(MODEL, plan.options.seed, torch.device("cpu")).state_dict()
    torch.save(weights, folder / "weights.pt")
    torch.save(dict(Batches(MODEL, plan).batch(0, 0)), folder / "batch.pt")
    stages = [{"rank": stage.rank, "layers": stage.layers} for stage in plan.stages]
    words = {"num_micro_batches": plan.num_micro_batches, "stages": stages}
    (folder / "stages.json").write_text(json.dumps(words))
    for csv_format in CsvFormat:
        (folder / f"{csv_format.value}.csv").write_text(print_csv(plan, csv_format))
    _run(folder)
    return {
        csv_format: {
            name: gradient
            for rank in range(NUM_RANKS)
            for name, gradient in torch.load(folder / f"{csv_format}.{rank}.pt").items()
        }
        for csv_format in pipelining_ranks.FORMATS
    }


def _run(folder: Path) -> None:
    script = str(Path(__file__).parent / "pipelining_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(NUM_RANKS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("csv_format", pipelining_ranks.FORMATS)
def test_gradients_of_torchs_runtime_are_ours(
    plan: Plan, by_torch: dict[str, dict[str, Tensor]], csv_format: str
) -> None:
    ours = train_by_plan(MODEL, plan, num_steps=1).steps[0].gradients
    theirs = by_torch[csv_format]
    assert {name for name, _, _ in ours} == theirs.keys()
    for name, first, values in ours:
        assert first == 0
        assert values.any(), name
        assert relative_rms(values.reshape(-1), theirs[name].reshape(-1)) <= TOLERANCE, name
