"""Every model of the zoo through the commands that a user calls, on four gloo processes.

What is left after two steps is what plain training in one process leaves.
"""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import command
from training import relative_rms, train_plainly
from zoo import PATHS

from planner.cli.plan import main as lga_plan
from planner.model_file import load_model_file
from planner.plan.file import read_plan
from planner.plan.types import Plan
from planner.trace import trace

pytestmark = pytest.mark.slow
LAYOUT = "--gpus 4 --cluster cpu --pipeline-ranks 4 --stages-per-rank 1"
SIZES = "--batch-size 4 --micro-batch-size 2 --time-limit 5"
SGD = """

def build_optimizer(parameters):
    import torch
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""
"""Adam would divide a gradient that is all rounding (of a key's bias, say) by itself."""
ALL_ROUNDING = 1e-9


def plan(model: str, output: Path) -> Plan:
    """In this process: starting the command takes longer than what it does."""
    words = (*LAYOUT.split(), *SIZES.split(), "--output", str(output))
    result = CliRunner().invoke(lga_plan, [model, *words])
    assert result.exit_code == 0, result.output
    return read_plan(output)


def run(folder: Path, *words: str) -> str:
    result = command(folder, "lga-run", *words, timeout_seconds=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def model_path(name: str, folder: Path) -> str:
    """The model file; where weights are tied, a copy that trains by SGD."""
    path = PATHS[name]
    if trace(load_model_file(str(path))).layer_graph(2).tied_parameters:
        text = path.read_text()
        path = folder / path.name
        path.write_text(text + SGD)
    return str(path)


@pytest.mark.parametrize("name", PATHS)
def test_plan_and_run(name: str, tmp_path: Path) -> None:
    model, output = model_path(name, tmp_path), tmp_path / "a.plan.yaml"
    made = plan(model, output)
    assert made.num_stages == made.num_pipeline_ranks == 4
    words = ("--steps", "2", "--verify", "--save", "weights.pt")
    assert "verify: passed" in run(tmp_path, str(output), model, *words)
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    plain = train_plainly(load_model_file(model), made, num_steps=2).state
    assert trained.keys() == plain.keys()
    is_tied = any(len(unit.ranks) > 1 for unit in made.units)
    for key, value in plain.items():
        if not torch.equal(value, trained[key]):
            assert is_tied, key
            largest = (trained[key] - value).abs().max()
            assert relative_rms(trained[key], value) <= 1e-6 or largest < ALL_ROUNDING, key
