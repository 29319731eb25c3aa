"""Two hundred steps of a GPT on real text, through the command line, on one, two and four ranks."""

import re
from pathlib import Path

import pytest
import torch
from commands import command
from torch import Tensor
from training import EXAMPLES, train_plainly

from planner.model_file import load_model_file
from planner.plan.file import read_plan

NUM_STEPS = 200
TIE = "        self.lm_head.weight = self.wte.weight\n"
_LOSS = re.compile(r"step (\d+)/\d+ .*?loss (\S+)")


def done(folder: Path, *words: str) -> str:
    """What a command says that ends well."""
    found = command(folder, *words, timeout_seconds=900)
    assert found.returncode == 0, found.stderr
    return found.stdout


def trained(folder: Path, num_ranks: int) -> tuple[list[str], dict[str, Tensor]]:
    """The losses as they are printed, and the weights at the end."""
    plan, weights = f"{num_ranks}.plan.yaml", f"{num_ranks}.pt"
    done(
        folder, "lga-plan", "gpt.py", "--gpus", str(num_ranks), "--cluster", "cpu",
        "--pipeline-ranks", str(num_ranks), "--batch-size", "16", "--micro-batch-size", "2",
        "--schedule", "layered", "--output", plan,
    )  # fmt: skip
    said = done(folder, "lga-run", plan, "gpt.py", "--steps", str(NUM_STEPS), "--save", weights)
    losses = _LOSS.findall(said)
    assert [int(step) for step, _ in losses] == list(range(1, NUM_STEPS + 1))
    return [loss for _, loss in losses], torch.load(folder / weights, weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    source = (EXAMPLES / "gpt.py").read_text(encoding="utf-8")
    # A weight that two ranks share would have its gradient added up in another order.
    assert source.count(TIE) == 1
    (tmp_path / "gpt.py").write_text(source.replace(TIE, ""), encoding="utf-8")
    plan_of_one = tmp_path / "1.plan.yaml"
    curves, states = zip(*(trained(tmp_path, number) for number in (1, 2, 4)), strict=True)
    assert curves[0] == curves[1] == curves[2]
    assert float(curves[0][-1]) < 0.6 * float(curves[0][0])
    model_file = load_model_file(str(tmp_path / "gpt.py"))
    plain = train_plainly(model_file, read_plan(plan_of_one), NUM_STEPS)
    for state in states:
        assert state.keys() == plain.state.keys()
        assert all(torch.equal(state[key], value) for key, value in plain.state.items())
