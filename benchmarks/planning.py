"""How long planning takes, what it needs and what it proves: `python benchmarks/planning.py`.

Runs `lga-plan` as a user does, from model file to written plan, on models with random weights. No
device is needed: the large ones are never allocated. The gap is the plan's own claim, which
`lga-check` verifies.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from planner.plan.file import read_plan
from planner.plan.types import Prediction

MODELS = Path(__file__).parent / "models"
EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = (
    (MODELS / "gpt2_small.py", 8, "a100-80", ()),
    (MODELS / "gpt2_xl.py", 8, "a100-80", ()),
    (EXAMPLES / "llama-8b.json", 16, "a100-80", ()),
    (MODELS / "llama_70b.py", 64, "a100-80", ()),
    (MODELS / "llama_70b.py", 256, "a100-80", ()),
    (MODELS / "t5_11b.py", 32, "a100-80", ()),
    (MODELS / "mixtral_8x7b.py", 64, "a100-80", ()),
    (EXAMPLES / "unet.py", 8, "a100-80", ()),
    (MODELS / "llama_405b.py", 16384, "h100-sxm", ()),
    (MODELS / "x_160.py", 38640, "a100-80", ("--batch-size", "2415")),
)
"""Model, devices, cluster, other options."""


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=1, help="Runs of each case.")
@click.option("--only", multiple=True, help="Name of a model; again for more.")
def main(repeats: int, only: tuple[str, ...]) -> None:
    """Print seconds, peak memory and gap of each case."""
    table = Table(title="lga-plan, from model file to plan")
    for column in ("model", "GPUs", "seconds", "CPU seconds", "peak memory so far", "step", "gap"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, num_gpus, cluster, options in CASES:
        if only and model.stem not in only:
            continue
        for _ in range(repeats):
            start, used = time.perf_counter(), _cpu_seconds()
            found = _plan(model, num_gpus, cluster, options)
            seconds, used = time.perf_counter() - start, _cpu_seconds() - used
            peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            table.add_row(
                model.stem,
                str(num_gpus),
                f"{seconds:.1f}",
                f"{used:.1f}",
                f"{peak_kib / 2**20:.2f} GiB",
                f"{found.step_seconds:.4g} s",
                f"{1 - (found.bound_seconds or 0.0) / found.step_seconds:.2%}",
            )
    Console().print(table)


def _cpu_seconds() -> float:
    """Of all child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _plan(model: Path, num_gpus: int, cluster: str, more: tuple[str, ...]) -> Prediction:
    command = [sys.executable, "-c", "from planner.cli.plan import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out.plan.yaml")
        options = ["--gpus", str(num_gpus), "--cluster", cluster, "--schedule", "layered"]
        options += ["--output", output, *more]
        subprocess.run([*command, str(model), *options], check=True, stdout=subprocess.DEVNULL)
        prediction = read_plan(output).prediction
    assert prediction is not None
    return prediction


if __name__ == "__main__":
    main()
