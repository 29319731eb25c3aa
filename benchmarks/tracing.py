"""How long tracing and profiling take, and in how much memory: `python benchmarks/tracing.py`.

Each model in a process of its own, from its Python code to a Profile: nothing of it is allocated.
With `--plan` the whole way to a plan on a number of devices, which adds the search. Seconds are of
the wall clock; those of the process itself stand in brackets, for machines that do other work too.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from planner.model_file import ModelFile, model_from_functions

SEQUENCE_LENGTH = 4096


def llama(hidden: int, between: int, layers: int, heads: int, vocabulary: int) -> ModelFile:
    """LLaMA of transformers in bfloat16, with 8 heads of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE_LENGTH,
        use_cache=False,
    )

    def build() -> nn.Module:
        model: nn.Module = LlamaForCausalLM(config)
        return model.to(torch.bfloat16)

    def batch(size: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, vocabulary, (size, SEQUENCE_LENGTH))
        return {"input_ids": tokens, "labels": tokens}

    return model_from_functions(build, batch)


def mlp(num_layers: int, *, equal: bool) -> ModelFile:
    """Linear layers; where they are not equal, each is wider than the one before."""
    widths = [64 if equal else 64 + layer for layer in range(num_layers + 1)]

    def build() -> nn.Module:
        return nn.Sequential(*[nn.Linear(*pair) for pair in itertools.pairwise(widths)])

    def batch(size: int) -> dict[str, Tensor]:
        return {"input": torch.randn(size, widths[0]), "target": torch.randn(size, widths[-1])}

    def loss(output: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(output, given["target"])

    return model_from_functions(build, batch, loss_fn=loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and the devices to plan it for."""

    build: Callable[[], ModelFile]
    num_devices: int


CASES = {
    "LLaMA, small": Case(build=lambda: llama(256, 688, 4, 8, 32000), num_devices=8),
    "LLaMA-70B": Case(build=lambda: llama(8192, 28672, 80, 64, 128256), num_devices=64),
    "LLaMA-405B": Case(build=lambda: llama(16384, 53248, 126, 128, 128256), num_devices=256),
    "MLP, 1000 equal layers": Case(build=lambda: mlp(1000, equal=True), num_devices=8),
    "MLP, 1000 unequal layers": Case(build=lambda: mlp(1000, equal=False), num_devices=8),
}
PHASES = ("import", "trace", "graph", "profile", "plan")


@click.command()
@click.option("--plan", "plans", is_flag=True, help="Plan for a number of devices, too.")
@click.option("--case", "only", type=click.Choice(list(CASES)), help="This model alone.")
@click.option("--measure", hidden=True, is_flag=True)
def main(plans: bool, only: str | None, measure: bool) -> None:
    """Print seconds of each phase, and the peak of resident memory."""
    if measure and only:
        click.echo(json.dumps(_measure(CASES[only], plans=plans)))
        return
    table = Table(title="seconds (of the process), micro-batches of one sample")
    for column in ("model", "layers", "distinct", *PHASES, "memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in [only] if only else CASES:
        words = [sys.executable, __file__, "--measure", "--case", name, *["--plan"] * plans]
        result = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        table.add_row(name, *json.loads(result.stdout.splitlines()[-1]))
    Console().print(table)


def _measure(case: Case, *, plans: bool) -> list[str]:
    """The row of a case, without its name."""
    clocks = [(time.perf_counter(), time.process_time())]

    def lap() -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    from planner.cluster import resolve_cluster
    from planner.measure import measure
    from planner.pipeline import make_plan
    from planner.trace import trace

    model_file = case.build()
    lap()
    traced = trace(model_file)
    lap()
    graph = traced.layer_graph(1)
    lap()
    measure(traced, 1)
    lap()
    if plans:
        cluster = resolve_cluster("h100-sxm", case.num_devices)
        make_plan(model_file, num_devices=case.num_devices, cluster=cluster)
    lap()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    laps = itertools.pairwise(clocks)
    spent = [f"{end[0] - start[0]:.1f} ({end[1] - start[1]:.1f})" for start, end in laps]
    if not plans:
        spent[-1] = "-"
    distinct = len({layer.signature for layer in graph.layers})
    return [str(len(graph.layers)), str(distinct), *spent, f"{peak_kib / 2**20:.2f} GiB"]


if __name__ == "__main__":
    main()
