"""How long planning takes and how much memory it needs: `python benchmarks/planning.py`.

Runs `lga-plan` as a user does, from model file to written plan, on two transformers models with
random weights. No device is needed: LLaMA-70B is never allocated.
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

MODELS = Path(__file__).parent / "models"
CASES = (("gpt2_small", 8), ("llama_70b", 64))


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=1, help="Runs of each case.")
def main(repeats: int) -> None:
    """Print seconds and peak memory of each case."""
    table = Table(title="lga-plan, from model file to plan")
    for column in ("model", "GPUs", "seconds", "peak memory so far"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, num_gpus in CASES:
        for _ in range(repeats):
            start = time.perf_counter()
            _plan(name, num_gpus)
            seconds = time.perf_counter() - start
            peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            table.add_row(name, str(num_gpus), f"{seconds:.1f}", f"{peak_kib / 2**20:.2f} GiB")
    Console().print(table)


def _plan(name: str, num_gpus: int) -> None:
    command = [sys.executable, "-c", "from planner.cli.plan import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out.plan.yaml")
        options = ["--gpus", str(num_gpus), "--output", output]
        model = str(MODELS / f"{name}.py")
        subprocess.run([*command, model, *options], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
