"""lga-plan --explain, --pareto, --compare and --what-if, as a user types them."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.cli.plan import main
from planner.cli.what_if import parse_what_if
from planner.errors import UsageError
from planner.explain.changes import WhatIf
from planner.plan.file import read_plan

MODEL = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)))

def example_batch(batch_size):
    return {"input": torch.zeros(batch_size, WIDTH), "target": torch.zeros(batch_size, WIDTH)}

def loss_fn(output, batch):
    return nn.functional.mse_loss(output, batch["target"])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL.replace("WIDTH", "64"))
    (tmp_path / "other.py").write_text(MODEL.replace("WIDTH", "32"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


PINNED = (
    "--micro-batches", "1", "--stages-per-rank", "1", "--partition", "0", "--no-recompute",
    "--no-offload-state", "--no-offload-inputs", "--buffers", "1",
)  # fmt: skip
"""Leaves little to search."""


def plan(*arguments: str, model: str = "small.py") -> Result:
    result = CliRunner().invoke(
        main, [model, "--cluster", "a100-80", "--time-limit", "5", *arguments]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpus", "2", *PINNED),
        pytest.param(("--gpus", "1"), marks=pytest.mark.slow),
        pytest.param(("--gpus", "2"), marks=pytest.mark.slow),
    ],
)
def test_explain(folder: Path, arguments: tuple[str, ...]) -> None:
    made = plan(*arguments, "--explain")
    assert made.exit_code == 0, made.output
    for words in ("is busiest", "is fullest", "1 device more", "no memory limit", "1F1B",
                  "data parallel only", "is the plan"):  # fmt: skip
        assert words in made.output
    assert (folder / "small.plan.yaml").exists()


WISH = "gpus=4,bandwidth=1Gbps,memory=1GB"


def test_what_if(folder: Path) -> None:
    made = plan("--gpus", "2", "--replicas", "2", *PINNED, "--what-if", WISH)
    assert made.exit_code == 0, made.output
    (devices,) = [row.split() for row in made.output.splitlines() if row.startswith("devices ")]
    assert devices == ["devices", "2", "4"]
    assert read_plan(folder / "small.plan.yaml").world_size == 2


def test_what_if_nothing_fits_there(folder: Path) -> None:
    """Why, and what would, each solved again; the plan for the cluster as it is stands."""
    made = plan("--gpus", "2", *PINNED, "--what-if", "memory=100kB", "--time-limit", "2")
    assert made.exit_code == 0, made.output
    assert "what if   memory=100kB: nothing fits there; the plan above" in made.output
    assert "why       no placement fits in memory" in made.output
    assert "would fit a memory limit of" in made.output
    assert (folder / "small.plan.yaml").exists()
    made = plan("--gpus", "2", "--pipeline-ranks", "2", *PINNED, "--what-if", "gpus=1")
    assert made.exit_code == 0, made.output
    assert "gpus=1: nothing fits there" in made.output
    assert "would fit 1 replica x 1 pipeline rank" in made.output


def test_one_device_has_no_pipeline_and_no_replicas(folder: Path) -> None:  # noqa: ARG001
    made = plan("--gpus", "1", *PINNED, "--explain", "--time-limit", "1")
    assert made.exit_code == 0, made.output
    rows = {line[:26].strip(): line.split() for line in made.output.splitlines()}
    for family in ("pipeline only", "data parallel only", "1F1B", "hybrid", "and weights (3)"):
        assert rows[family][-3:] == ["needs", "two", "devices"]
    assert rows["data and pipeline"][-3:] == ["needs", "four", "devices"]
    assert rows["layered"][-3:] == ["is", "the", "plan"]


def test_compare(folder: Path) -> None:
    plan("--gpus", "2", "--pipeline-ranks", "2", *PINNED, "--output", "before.yaml")
    made = plan("--gpus", "2", "--replicas", "2", *PINNED, "--compare", "before.yaml")
    assert made.exit_code == 0, made.output
    assert "1 x 2" in made.output
    assert "moved" in made.output
    refused = plan("--gpus", "2", "--compare", "before.yaml", model="other.py")
    assert refused.exit_code == 2
    assert "of one model" in refused.output
    assert not (folder / "other.plan.yaml").exists()


@pytest.mark.parametrize(
    ("suffix", "others"),
    [
        (".html", PINNED),
        (".svg", PINNED),
        pytest.param(".csv", (), marks=pytest.mark.slow),
    ],
)
def test_pareto(folder: Path, suffix: str, others: tuple[str, ...]) -> None:
    made = plan("--gpus", "2", *others, "--pareto-output", f"out{suffix}")
    assert made.exit_code == 0, made.output
    assert "time and memory" in made.output
    assert "time and devices" in made.output
    assert "*" in made.output
    assert (folder / f"out{suffix}").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--what-if", "bandwith=25Gbps"), "did you mean bandwidth?"),
        (("--what-if", "colour=red"), "known: bandwidth"),
        (("--what-if", "bandwidth"), "bandwidth has no value"),
        (("--what-if", "bandwidth=25"), "no unit is no unit of bandwidth"),
        (("--what-if", "bandwidth=25GHz"), "GHz is no unit of bandwidth"),
        (("--what-if", "bandwidth=-1Gbps"), "-1Gbps is not a number above 0"),
        (("--what-if", "memory=lots"), "not a number of bytes"),
        (("--what-if", "gpus=0"), "0 is not a whole number"),
        (("--what-if", "latency=3"), "no unit is no unit of time"),
        (("--what-if", "gpus=2,gpus=4"), "gpus stands twice"),
        (("--pareto-output", "out.pdf"), ".html, .svg, .csv"),
        (("--pareto-output", "missing/out.csv"), "cannot write"),
        (("--what-if", "memory=-5GB"), "--what-if memory=-5GB: '-5GB' is below 0"),
        (("--what-if", "batch-size=-1"), "--what-if batch-size=-1: -1 is not a whole number"),
        (("--what-if", ""), "unknown key ''"),
        (("--pareto-output", "."), "is no known kind of file"),
        (("--compare", "missing.yaml"), "missing.yaml"),
        (("--compare", "small.py"), "small.py is not a plan: its first line is ''"),
        (("--compare", "."), ". is not a file"),
    ],
)
def test_wrong_words_are_refused_before_planning(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused = plan("--gpus", "2", *arguments)
    assert refused.exit_code == 2, refused.output
    assert words in refused.output
    assert list(folder.glob("*.yaml")) == []


def test_infeasible_names_what_would_help(folder: Path) -> None:
    refused = plan("--gpus", "2", *PINNED, "--memory-limit", "20kB")
    assert refused.exit_code == 1, refused.output
    assert "on pipeline rank" in refused.output
    assert "try: " in refused.output
    assert list(folder.glob("*.yaml")) == []
    enough, unit = re.findall(r"a memory limit of ([\d.]+) (\w+) per device", refused.output)[0]
    made = plan("--gpus", "2", *PINNED, "--memory-limit", f"{enough}{unit}")
    assert made.exit_code == 0, made.output


def test_units() -> None:
    for text, rate in {
        "25Gbps": 25e9 / 8, "25 Gbit/s": 25e9 / 8, "3.1GB/s": 3.1e9, "100Mbps": 12.5e6,
    }.items():  # fmt: skip
        assert parse_what_if(f"bandwidth={text}") == WhatIf(bandwidth=rate)
    with pytest.raises(UsageError, match="no unit"):
        parse_what_if("bandwidth=7")
    assert parse_what_if("latency=5us, memory=40GB,batch-size=8,gpus=16") == WhatIf(
        latency_seconds=5e-6, memory_bytes=40 * 10**9, num_devices=16, global_batch_size=8
    )
