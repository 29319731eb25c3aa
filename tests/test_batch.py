"""Batches by number, by law and by range; steps, hours and money: through lga-plan."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_cli_plan import MODEL

from planner.batch import BatchRange, Training, critical_batch_tokens, sizes_in
from planner.cli.plan import main as plan_command
from planner.errors import UsageError
from planner.plan.file import read_plan
from planner.solve import Constraints

WORDS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 16)
        self.blocks = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    def forward(self, words):
        return self.blocks(self.embed(words))

def build_model():
    return Model()

def example_batch(batch_size):
    return {"words": torch.zeros(batch_size, 32, dtype=torch.int64),
            "kind": torch.zeros(batch_size, dtype=torch.int64)}

def loss_fn(output, batch):
    return output.square().mean()
"""
PARAMETERS = 1000 * 16 + 3 * (16 * 16 + 16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "words.py").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(model: str, *words: str, gpus: int = 2) -> Result:
    """With what is beside the point decided, so that there is little to search."""
    fixed = (
        "--gpus", str(gpus), "--cluster", "a100-80", "--time-limit", "2", "--pipeline-ranks", "1",
        "--stages-per-rank", "1", "--no-recompute", "--buffers", "2", "--no-offload-state",
        "--no-offload-inputs", "--partition", "0",
    )  # fmt: skip
    result = CliRunner().invoke(plan_command, [model, *fixed, *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_law_gives_the_published_family() -> None:
    """X_x: 12 x^5 parameters, sequences of 16 x tokens, critical batch 82 x^(2/3) sequences."""
    for x in (1, 32, 160):
        sequences = critical_batch_tokens(12 * x**5) / (16 * x)
        assert sequences == pytest.approx(82 * x ** (2 / 3))


def test_a_critical_batch(folder: Path) -> None:
    made = plan("words.py", "--critical-batch")
    assert made.exit_code == 0, made.output
    law = 1312 * (PARAMETERS / 12) ** (1 / 3) / 32
    size = read_plan(folder / "words.plan.yaml").global_batch_size
    assert f"critical batch: {size} samples per step" in made.output
    assert 0.8 * law < size <= law


def test_the_other_name_of_the_batch(folder: Path) -> None:
    made = plan("small.py", "--batch-size", "12")
    assert made.exit_code == 0, made.output
    assert read_plan(folder / "small.plan.yaml").global_batch_size == 12
    assert "training" not in made.output


def test_a_range_takes_the_batch_with_the_least_time_per_sample(folder: Path) -> None:
    made = plan("small.py", "--global-batch", "3..13", "--samples", "1e6", "--price", "2")
    assert made.exit_code == 0, made.output
    assert "batches   4, 6, 8, 10, 12 samples" in made.output
    assert "schedule" in next(line for line in made.output.splitlines() if "mesh x loops" in line)
    rows = re.findall(r"│ +(\d+) │.*│ +layered │ +([\d.]+) us │ +([\d.]+) us │", made.output)
    assert [int(batch) for batch, _, _ in rows] == [4, 6, 8, 10, 12]
    for batch, step, sample in rows:
        assert float(step) / int(batch) == pytest.approx(float(sample), rel=0.02)
    best = min(rows, key=lambda row: float(row[2]))
    assert read_plan(folder / "small.plan.yaml").global_batch_size == int(best[0])


@pytest.mark.parametrize(
    ("wanted", "devices", "constraints", "sizes"),
    [
        ((256, 1024), 8, Constraints(), [256, 320, 384, 448, 512, 640, 768, 896, 1024]),
        ((1, 8), 1, Constraints(), [1, 2, 3, 4, 5, 6, 7, 8]),
        ((60, 70), 64, Constraints(), [64]),
        ((65, 70), 64, Constraints(), [70]),
        ((10, 40), 20, Constraints(), [20, 40]),
        ((10, 40), 20, Constraints(num_replicas=5), [10, 15, 20, 25, 30, 35, 40]),
        ((10, 40), 4, Constraints(num_replicas=2, micro_batch_size=3), [12, 18, 24, 30, 36]),
        ((38, 38), 4, Constraints(num_micro_batches=19), [38]),
    ],
)
def test_sizes_in_a_range(
    wanted: tuple[int, int], devices: int, constraints: Constraints, sizes: list[int]
) -> None:
    least, most = wanted
    assert sizes_in(BatchRange(least=least, most=most), devices, constraints) == sizes


def test_a_range_without_any_multiple_says_so() -> None:
    with pytest.raises(UsageError, match=r"50\.\.60 samples is a multiple of 48"):
        sizes_in(BatchRange(least=50, most=60), 8, Constraints(num_replicas=6, micro_batch_size=8))


@pytest.mark.parametrize(
    ("length", "steps"),
    [(("--steps", "1000"), 1000), (("--samples", "64001"), 4001), (("--tokens", "512000"), 1000)],
)
def test_hours_and_cost_are_those_of_the_predicted_step(
    folder: Path, length: tuple[str, str], steps: int
) -> None:
    made = plan("words.py", "--global-batch", "16", *length, "--price", "3600000")
    assert made.exit_code == 0, made.output
    written = read_plan(folder / "words.plan.yaml")
    assert f"{steps} steps of 16 samples" in made.output
    assert written.prediction is not None
    seconds = steps * written.prediction.step_seconds * written.world_size
    cost = float(re.findall(r"cost +([\d,.]+), at", made.output)[0].replace(",", ""))
    assert cost == pytest.approx(seconds * 1000, rel=1e-3, abs=0.01)
    hours = float(re.findall(r"([\d.e-]+) GPU-hours", made.output)[0])
    assert hours == pytest.approx(seconds / 3600, rel=0.01)


def test_a_last_step_is_whole() -> None:
    assert Training(num_samples=17).steps_with(16, None) == 2
    assert Training(num_tokens=16 * 8 + 1).steps_with(16, 8) == 2
    assert Training(num_steps=3).steps_with(16, None) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--global-batch", "1024..256"), "1024..256 is upside down: 1024 is more than 256"),
        (("--global-batch", "1024..256"), "write 256..1024"),
        (("--global-batch", "1..2..3"), "'1..2..3' is no number and no range"),
        (("--global-batch", ".."), "'..' is a range with an end missing"),
        (("--batch-size", "8.."), "'8..' is a range with an end missing"),
        (("--batch-size", "..8"), "'..8' is a range with an end missing"),
        (("--batch-size", "8.."), "both ends of a range as in 8..64"),
        (("--batch-size", "a..b"), "'a..b' is no number and no range"),
        (("--batch-size", "4.5"), "'4.5' is no number and no range"),
        (("--batch-size", "0..4"), "0..4: 0 is not a number of samples from 1 to"),
        (("--batch-size", "1..99999999999"), "99999999999 is not a number of samples from 1 to"),
        (("--global-batch", "-4..8"), "-4 is not a number of samples from 1 to"),
        (("--critical-batch",), "--critical-batch counts tokens"),
        (("--tokens", "1e9"), "--tokens counts tokens"),
        (("--critical-batch", "--global-batch", "8"), "--global-batch 8 both give the batch"),
        (("--steps", "10", "--samples", "1e3"), "--steps 10 and --samples 1000 both give"),
        (("--price", "2.5"), "--price 2.5 is the price of an hour"),
        (("--price", "-1", "--steps", "1"), "--price"),
        (("--steps", "0"), "0 is not in the range"),
        (("--tokens", "nan"), "not a finite number"),
        (
            ("--global-batch", "5..7", "--replicas", "2", "--micro-batches", "4"),
            "5..7 samples is less than --replicas 2 x --micro-batches 4 = 8",
        ),
        (
            ("--global-batch", "9..15", "--replicas", "2", "--micro-batches", "4"),
            "no global batch of 9..15 samples is a multiple of 8",
        ),
    ],
)
def test_what_contradicts_exits_2_and_writes_nothing(
    folder: Path, words: tuple[str, ...], message: str
) -> None:
    refused = plan("small.py", *words)
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.output.split())
    assert "Traceback" not in refused.output
    assert not list(folder.glob("*.yaml"))


def test_a_range_in_which_nothing_fits_names_what_would(folder: Path) -> None:
    refused = plan("small.py", "--batch-size", "6..8", "--memory-limit", "1kB")
    assert refused.exit_code == 1, refused.output
    assert "micro-batches of" in refused.output or "micro-batch of" in refused.output
    assert "try: " in refused.output
    assert "a memory limit of" in refused.output
    assert not list(folder.glob("*.yaml"))


def test_a_range_of_one_is_a_number(folder: Path) -> None:
    made = plan("small.py", "--batch-size", "8..8")
    assert made.exit_code == 0, made.output
    assert "batches" not in made.output
    assert read_plan(folder / "small.plan.yaml").global_batch_size == 8


def test_a_critical_batch_below_what_is_demanded(folder: Path) -> None:  # noqa: ARG001
    refused = plan("words.py", "--critical-batch", "--micro-batches", "1000")
    assert refused.exit_code == 2
    assert "less than the 1000 that" in refused.output
