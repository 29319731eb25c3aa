"""lga-profile MODEL from the command line, and lga-plan with what it measured."""

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from planner.cli.plan import main as plan_command
from planner.cli.profile import main as profile_command
from planner.measure.file import read_profile
from planner.plan.file import read_plan

MODEL = """
import torch
from torch import nn

LENGTH, CLASSES = 6, 8

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("scale", torch.full((16,), 3.0), persistent=False)

    def forward(self, x):
        return x + self.norm(self.inner(x)) * self.scale

def build_model():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(LENGTH, 16), *(Block() for _ in range(4)), nn.Linear(16, 8)
    )

def example_batch(batch_size):
    return {"input": torch.randn(batch_size, LENGTH),
            "target": torch.randint(CLASSES, (batch_size,))}

def loss_fn(output, batch):
    return nn.functional.cross_entropy(output, batch["target"])

def build_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: click.Command, *arguments: str) -> Result:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(command, list(arguments))
    torch.set_num_threads(threads)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def profile(*arguments: str) -> Result:
    return run(profile_command, "small.py", "--device", "cpu", "--repeats", "2", *arguments)


def plan(*arguments: str) -> Result:
    return run(
        plan_command, "small.py", "--gpus", "1", "--cluster", "cpu", "--time-limit", "3",
        "--profile", "small.profile.yaml", *arguments,
    )  # fmt: skip


def test_measured_layers_are_written_shown_and_planned_with(folder: Path) -> None:
    made = profile("--micro-batch-size", "4,2")
    assert made.exit_code == 0, made.output
    for words in ("and 3 more", "update", "spread", "counted", "optimizer", "all layers",
                  "updates with SGD", "profile   written to small.profile.yaml"):  # fmt: skip
        assert words in made.output
    measured = read_profile(folder / "small.profile.yaml")
    assert [size.micro_batch_size for size in measured.sizes] == [2, 4]
    assert measured.command.endswith("small.py --device cpu --repeats 2 --micro-batch-size 4,2")
    assert measured.versions.torch == str(torch.__version__)
    for size in measured.sizes:
        names = [name for layer in size.layers for name in layer.layers]
        assert len(names) == len(set(names)) == 6
        assert [len(layer.layers) for layer in size.layers] == [1, 4, 1]
        assert [layer.optimizer_bytes for layer in size.layers] == [
            layer.profile.parameter_bytes for layer in size.layers
        ]
    planned = plan(
        "--micro-batch-size", "4", "--batch-size", "8", "--stages-per-rank", "1", "--no-recompute"
    )
    assert planned.exit_code == 0, planned.output
    assert "layers    measured on" in planned.output
    written = read_plan(folder / "small.plan.yaml")
    assert written.prediction is not None
    assert f"measured on {measured.device.name}, {measured.date}" in written.prediction.provenance
    layers = measured.sizes[1].layers
    for part in ("forward", "backward"):
        medians = sum(getattr(layer, part).median * len(layer.layers) for layer in layers)
        assert getattr(written.stages[0], f"{part}_seconds") == pytest.approx(medians)
    compute = 2 * (written.stages[0].forward_seconds + written.stages[0].backward_seconds)
    updates = sum(layer.update.median * len(layer.layers) for layer in measured.sizes[0].layers)
    assert written.prediction.step_seconds == pytest.approx(compute + updates, rel=0.05)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("3", "interpolated between micro-batches of 2 and 4"),
        ("8", "at micro-batches of 4; to 8 by the roofline"),
    ],
)
def test_other_sizes_say_where_they_come_from(folder: Path, size: str, words: str) -> None:
    assert profile("--micro-batch-size", "2,4", "--repeats", "1").exit_code == 0
    planned = plan("--micro-batch-size", size, "--batch-size", "24")
    assert planned.exit_code == 0, planned.output
    assert words in planned.output
    prediction = read_plan(folder / "small.plan.yaml").prediction
    assert prediction is not None
    assert words in prediction.provenance


@pytest.mark.usefixtures("folder")
def test_a_plan_takes_a_profile_of_many_sizes() -> None:
    """More sizes than the search traces: it derives the others."""
    assert profile("--micro-batch-size", "2,4,8", "--repeats", "1").exit_code == 0
    planned = plan("--batch-size", "8")
    assert planned.exit_code == 0, planned.output


def test_sizes_of_one(folder: Path) -> None:
    (folder / "small.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build_model(): return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))\n"
        "def example_batch(batch_size): return {'input': torch.ones(batch_size, 1)}\n"
        "def loss_fn(output, batch): return output.mean()\n"
    )
    made = profile("--micro-batch-size", "1", "--repeats", "1", "--output", "one.yaml")
    assert made.exit_code == 0, made.output
    assert "updates with AdamW" in made.output
    (size,) = read_profile(folder / "one.yaml").sizes
    assert size.micro_batch_size == 1
    assert all(layer.forward.spread == 0 for layer in size.layers)


def test_a_profile_of_another_model_is_refused(folder: Path) -> None:
    assert profile("--micro-batch-size", "2", "--repeats", "1").exit_code == 0
    (folder / "small.py").write_text(MODEL.replace("range(4)", "range(5)"))
    refused = plan("--batch-size", "8")
    assert refused.exit_code == 2
    assert "measured of another model: small" in refused.output
    # The same model on longer samples: only the layers' own signatures can tell.
    (folder / "small.py").write_text(MODEL.replace("(batch_size, LENGTH)", "(batch_size, 2, 3)"))
    refused = plan("--batch-size", "8")
    assert refused.exit_code == 2
    assert "measured of another computation" in refused.output
    assert not (folder / "small.plan.yaml").exists()


def test_a_profile_of_another_device_is_refused(folder: Path) -> None:
    assert profile("--micro-batch-size", "2", "--repeats", "1").exit_code == 0
    refused = plan("--batch-size", "8", "--cluster", "a100-80")
    assert refused.exit_code == 2
    assert "the cluster a100-80 has a100-80" in refused.output
    assert not (folder / "small.plan.yaml").exists()


def test_a_layer_that_fails_writes_nothing(folder: Path) -> None:
    # Fake tensors have no values, so that only a real run finds a class that there is not.
    (folder / "small.py").write_text(
        MODEL.replace("torch.randint(CLASSES, (batch_size,))", "torch.full((batch_size,), 9)")
    )
    failed = profile("--micro-batch-size", "2")
    assert failed.exit_code == 1
    assert "on cpu with micro-batches of 2: IndexError" in failed.output
    assert [path.name for path in folder.iterdir() if path.suffix == ".yaml"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batch-size", "0"], "micro-batch-size"),
        (["--micro-batch-size", "1,two"], "micro-batch-size"),
        (["--micro-batch-size", ""], "micro-batch-size"),
        (["--repeats", "0"], "repeats"),
        (["--output", "no/such/folder.yaml"], "there is no folder no/such"),
        (["--output", "small.py"], "is an input of this command"),
    ],
)
def test_wrong_options_are_refused(folder: Path, arguments: list[str], words: str) -> None:
    refused = profile(*arguments)
    assert refused.exit_code == 2
    assert words in refused.output
    assert (folder / "small.py").read_text() == MODEL


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused(folder: Path) -> None:
    refused = profile("--device", "cuda")
    assert refused.exit_code == 2
    assert "finds no CUDA device" in refused.output
    assert not (folder / "small.profile.yaml").exists()


@NEEDS_CUDA
def test_cuda_events_and_allocated_memory(folder: Path) -> None:
    made = profile("--device", "cuda", "--micro-batch-size", "2")
    assert made.exit_code == 0, made.output
    measured = read_profile(folder / "small.profile.yaml")
    assert measured.device.kind == "cuda"
    assert measured.versions.cuda is not None
    for layer in measured.sizes[0].layers:
        assert layer.forward.median > 0
        assert layer.forward_peak_bytes >= layer.profile.forward_transient_bytes
