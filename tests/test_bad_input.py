"""Wrong input to the commands: refused in words that help, without a traceback or a file left."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from test_cli_plan import MODEL

from planner.cli.check import main as check_command
from planner.cli.plan import main as plan_command
from planner.cli.show import main as show_command
from planner.console import check_can_write
from planner.errors import UsageError
from planner.files import write_whole
from planner.plan.file import read_plan
from runtime.inputs import CheckedDataset
from runtime.launch import main as run_command

BUILD = "return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)))"
BATCH = 'return {"input": torch.zeros(batch_size, 8), "target": torch.zeros(batch_size, 8)}'
LOSS = 'return nn.functional.mse_loss(output, batch["target"])'
FORWARD = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, input):
        hidden = self.first(input)
        {}
        return self.second(hidden)
def build_model():
    return Model()
"""
CLUSTER = """
name: two processes
hosts:
  - {device: v100-32, count: 2}
network: loopback
backend: gloo
"""


BOARD = """
hosts:
  - device:
      name: board
      memory_bytes: 16e9
      reserved_bytes: 1e9
      peak_flops: {float32: 10e12}
      memory_bandwidth: 500e9
    count: 2
    link: pcie4
network: ethernet-25
"""
CLUSTERS = {
    "cluster": CLUSTER,
    "no_memory": CLUSTER.replace("count: 2", "count: 2, memory_bytes: 0").replace(
        "name: two processes", ""
    ),
    "torn": """
hosts:
  - {name: left, device: v100-32, count: 1}
  - {name: middle, device: v100-32, count: 1}
  - {name: right, device: v100-32, count: 1}
links:
  - {between: [left, middle], link: ethernet-25}
  - {between: [middle, right], link: ethernet-25}
""",
    "negative": BOARD.replace("memory_bytes: 16e9", "memory_bytes: -16e9"),
    "full": BOARD.replace("reserved_bytes: 1e9", "reserved_bytes: 16e9"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.py").write_text(MODEL)
    for name, text in CLUSTERS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"__pycache__"}


def run(command: click.Command, *words: str) -> Result:
    return CliRunner().invoke(command, list(words))


def plan(model: str, *words: str) -> Result:
    return run(
        plan_command, model, "--gpus", "2", "--cluster", "cluster.yaml", "--time-limit", "2", *words
    )


def assert_refused(result: Result, folder: Path, before: set[str], *words: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert contents(folder) == before
    for word in words:
        assert word in result.stderr


def with_forward(line: str) -> str:
    start = MODEL.index("def build_model")
    return MODEL[:start] + FORWARD.format(line) + MODEL[MODEL.index("def example_batch") :]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MODEL.replace(BUILD, "raise ValueError('teapot')"), ("build_model()", "teapot", "line 6")),
        (MODEL.replace("build_model()", "build_model(size)"), ("build_model(size) cannot be",)),
        (MODEL.replace(BUILD, "pass"), ("build_model()", "NoneType")),
        (MODEL + "build_model = nn.Linear(8, 8)", ("build_model is Linear", "not a function")),
        (MODEL.replace(BATCH, "raise ValueError('teapot')"), ("example_batch(2)", "line 9")),
        (MODEL.replace(BATCH, "return {}"), ("an empty dict",)),
        (MODEL.replace('"input"', '"inputs"'), ("needs 'input'", "it has inputs, target")),
        (MODEL.replace(LOSS, "raise ValueError('teapot')"), ("loss_fn raised", "line 12")),
        (MODEL.replace(LOSS, "return output.mean().item()"), ("line 12", "reads tensor values")),
        (MODEL.replace(LOSS, "return output.mean(1)"), ("shape (2,)", "mean")),
        (MODEL.replace(LOSS, "return output.mean().reshape(1)"), ("shape (1,)", "mean")),
        (MODEL.replace(LOSS, "return 3.0"), ("the loss is float",)),
        (MODEL.replace(LOSS, "return batch['target'].mean()"), ("no trainable parameter",)),
        (MODEL.replace("nn.Linear(8, 8), ", ""), ("nothing to train", "0 parameters")),
        (MODEL.replace(BUILD, f"{BUILD}.requires_grad_(False)"), ("nothing to train",)),
        (with_forward("if hidden.sum() > 0: hidden = -hidden"), ("line 12", "torch.where")),
        (with_forward("hidden = torch.from_numpy(hidden.numpy())"), ("line 12", "torch.where")),
        (with_forward("raise ValueError('teapot')"), ("teapot", "line 12", "plain PyTorch")),
        (
            MODEL.replace("torch.optim.SGD(parameters, lr=0.1, momentum=0.9)", "3"),
            ("an Optimizer",),
        ),
        ("\0", ("not valid Python",)),
        ("", ("does not define build_model",)),
    ],
)
def test_a_bad_model_file(folder: Path, text: str, words: tuple[str, ...]) -> None:
    (folder / "bad.py").write_text(text)
    before = contents(folder)
    assert_refused(plan("bad.py", "--batch-size", "8"), folder, before, "error: ", "try: ", *words)


@pytest.mark.parametrize("model", [".", "", "/", "small.PY", "cluster.yaml", "no.such.module"])
def test_what_is_no_model_file(folder: Path, model: str) -> None:
    assert_refused(plan(model), folder, contents(folder), "error: ", "try: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-size", "0"), "0 is not a number of samples from 1 to"),
        (("--batch-size", "99999999999999999999"), "is not a number of samples from 1 to"),
        (("--gpus", "-1"), "-1 is not in the range"),
        (("--gpus", "100000000"), "more than the"),
        (("--time-limit", "nan"), "finite"),
        (("--seed", "9" * 23), "not in the range"),
        (("--batch-size", "8", "--micro-batch-size", "3"), "not divisible by micro-batch size 3"),
        (("--pipeline-ranks", "2", "--stages-per-rank", "4"), "the model has 6 layers"),
        (("--gpus", "4"), "2 devices"),
        (("--cluster", "a100"), "did you mean a100-40 or a100-80"),
        (("--cluster", "small.py"), "unknown cluster"),
        (("--memory-limit", "1kB", "--pipeline-ranks", "1", "--replicas", "1"), "pipeline rank 0"),
        (("--memory-limit", "-5GB"), "--memory-limit: '-5GB' is below 0 bytes"),
        (("--memory-limit", "0"), "is no memory at all"),
        (("--memory-limit", "40GB"), "--memory-limit 40GB is more than the 34.4 GB of memory that"),
        (("--batch-size", "1", "--replicas", "2"), "batch of 1 samples is less than --replicas 2"),
        (
            ("--batch-size", "6", "--replicas", "2", "--micro-batches", "4"),
            "batch of 6 samples is less than --replicas 2 x --micro-batches 4 = 8",
        ),
        (
            ("--batch-size", "9", "--replicas", "2"),
            "batch of 9 samples is not divisible by replicas 2",
        ),
        (("--replicas", "2", "--pipeline-ranks", "2"), "need 4 devices, but --gpus is 2"),
        (("--partition", "3", "--replicas", "1"), "--partition 3 divides the state among replicas"),
        (("--partition", "1", "--pipeline-ranks", "2"), "--pipeline-ranks 2 of --gpus 2 leave one"),
        (("--partition", "4"), "'4' is not one of"),
        (("--buffers", "0"), "0 is not in the range"),
        (("--offload-state", "--no-offload-state", "--buffers", "-1"), "-1 is not in the range"),
        (
            ("--cluster", "no_memory.yaml", "--offload-state"),
            "--offload-state needs host memory, but memory_bytes of a host of no_memory is 0",
        ),
        (
            ("--cluster", "no_memory.yaml", "--offload-inputs"),
            "--offload-inputs needs host memory",
        ),
        (("--cluster", "torn.yaml"), "torn.yaml: no link between left and right"),
        (("--cluster", "negative.yaml"), "negative.yaml: hosts.0.device.memory_bytes.value = -16"),
        (("--cluster", "full.yaml"), "reserved_bytes 1.6e+10 leave nothing of memory_bytes 1.6e+1"),
        (("--output", "."), "it is a folder"),
        (("--output", "small.py"), "it is an input"),
        (("--output", "missing/a.yaml"), "mkdir -p missing"),
        (("--output", "small.py/a.yaml"), "there is no folder small.py"),
    ],
)
def test_bad_options(folder: Path, words: tuple[str, ...], message: str) -> None:
    assert_refused(plan("small.py", *words), folder, contents(folder), message)


def test_a_missing_folder_is_refused_before_planning(folder: Path) -> None:  # noqa: ARG001
    with pytest.raises(UsageError, match="there is no folder"):
        check_can_write(Path("missing/a"), "--output")
    with pytest.raises(UsageError, match="an input"):
        check_can_write(Path("small.py"), "--output", ["./small.py"])
    check_can_write(Path("new.yaml"), "--output", ["small.py", "missing.yaml"])


def test_what_is_no_file_is_not_replaced(folder: Path) -> None:
    """As /dev/null, which whoever runs as root could rename a file over."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        assert_refused(
            plan("small.py", "--output", name), folder, contents(folder), "it is no regular file"
        )
        with pytest.raises(OSError, match="regular"):
            write_whole(folder / name, b"new")
    assert (folder / "pipe").is_fifo()
    assert (folder / "link").is_symlink()


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def spoiled(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        "empty": b"",
        "binary": bytes(range(256)),
        "cut": content[:middle],
        "flipped": flipped,
        "number": content.replace(b"micro_batch_size: ", b"micro_batch_size: 1", 1),
        "instruction": content.replace(b"FORWARD", b"BACKWARD", 1),
    }


def test_a_spoiled_plan_is_refused_by_every_command(folder: Path) -> None:
    assert plan("small.py", "--batch-size", "8").exit_code == 0
    content = (folder / "small.plan.yaml").read_bytes()
    for name, spoilt in spoiled(content).items():
        assert spoilt != content
        (folder / "bad.yaml").write_bytes(spoilt)
        before = contents(folder)
        for command, words in (
            (check_command, ()), (show_command, ()), (run_command, ("small.py",))
        ):  # fmt: skip
            result = run(command, "bad.yaml", *words)
            assert_refused(result, folder, before, "error: bad.yaml", "try: ")
            assert result.exit_code == 2, name


def test_a_plan_for_gpus_needs_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made = plan("small.py", "--cluster", "a100-80", "--pipeline-ranks", "2", "--batch-size", "8")
    assert made.exit_code == 0
    result = run(run_command, "small.plan.yaml", "small.py")
    assert_refused(result, folder, contents(folder), "has 1 GPUs", "--cluster cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "0"), "0 is not in the range"),
        (("--save", "missing/a.pt"), "mkdir -p missing"),
        (("--save", "."), "it is a folder"),
        (("--save", "small.plan.yaml"), "it is an input"),
        (("--deadline", "inf"), "finite"),
    ],
)
def test_bad_options_of_a_run(folder: Path, words: tuple[str, ...], message: str) -> None:
    assert plan("small.py", "--batch-size", "8").exit_code == 0
    result = run(run_command, "small.plan.yaml", "small.py", *words)
    assert_refused(result, folder, contents(folder), message)
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((1, 2), "is a tuple, not a dict"),
        ({"input": torch.zeros(8)}, "has no key 'target'; it has 'input'"),
        ({"input": torch.zeros(9), "target": torch.zeros(8)}, r"'input' float32 of shape \(9,\)"),
        ({"input": torch.zeros(8).double(), "target": torch.zeros(8)}, "float64"),
        ({"input": [0.0] * 8, "target": torch.zeros(8)}, "a list"),
    ],
)
def test_bad_items_of_a_dataset(folder: Path, item: object, message: str) -> None:
    assert plan("small.py", "--batch-size", "8").exit_code == 0
    made = read_plan(folder / "small.plan.yaml")
    with pytest.raises(UsageError, match=f"item 1 .*{message}"):
        CheckedDataset([None, item], made)[1]
    good = {"input": torch.zeros(8), "target": torch.zeros(8).numpy()}
    assert CheckedDataset([good], made)[0] is good


def test_the_dataset_of_a_run_is_checked(folder: Path) -> None:
    (folder / "data.py").write_text(MODEL + "def build_dataset():\n    return [{}] * 100\n")
    made = plan("data.py", "--pipeline-ranks", "2", "--batch-size", "8")
    assert made.exit_code == 0, made.output
    process = subprocess.run(
        [sys.executable, "-c", "from runtime.launch import main; main()", "data.plan.yaml",
         "data.py", "--steps=1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert "has no key 'input'; it has nothing" in process.stderr
    assert process.stderr.count("error: ") == 1
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", [plan_command, check_command, show_command, run_command])
def test_every_option_is_explained(command: click.Command) -> None:
    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []
    for flag in ("-h", "--help"):
        assert run(command, flag).exit_code == 0


def test_tables_are_wide_in_a_pipe() -> None:
    words = "from planner.console import console; print(console.width)"
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    for more, width in (({}, 140), ({"COLUMNS": "99"}, 99)):
        process = subprocess.run(
            [sys.executable, "-c", words], env=environment | more, capture_output=True, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        assert int(process.stdout) == width
