"""Layers on a GPU, measured against modelled: `python benchmarks/gpu_layers.py --device cuda`.

GPT-2 medium, LLaMA-8B and ViT-L in bfloat16. Writes a profile of each to profiles/models, and
prints, per distinct layer, measured seconds against the roofline of the device's hardware profile,
and allocated against counted memory. Only the layer under test is on the device.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import click
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from planner.cluster import resolve_cluster
from planner.cluster.types import Device
from planner.cost import layer_seconds
from planner.measure.file import write_profile
from planner.measure.measured import MeasuredModel
from planner.measure.session import measure_model
from planner.model_file import ModelFile, model_from_functions

FOLDER = Path(__file__).parents[1] / "profiles" / "models"


def tokens(vocabulary: int, length: int, batch_size: int) -> dict[str, Tensor]:
    found = torch.randint(vocabulary, (batch_size, length))
    return {"input_ids": found, "labels": found.clone()}


def gpt2_medium() -> ModelFile:
    def build_model() -> nn.Module:
        config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)
        return transformers.GPT2LMHeadModel(config).to(torch.bfloat16)

    return model_from_functions(build_model, lambda n: tokens(50257, 1024, n), name="gpt2-medium")


def llama_8b() -> ModelFile:
    def build_model() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)

    return model_from_functions(build_model, lambda n: tokens(128256, 4096, n), name="llama-8b")


def vit_large() -> ModelFile:
    def build_model() -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            num_labels=1000,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config).to(torch.bfloat16)

    def example_batch(batch_size: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(batch_size, 3, 224, 224, dtype=torch.bfloat16),
            "labels": torch.randint(1000, (batch_size,)),
        }

    return model_from_functions(build_model, example_batch, name="vit-large")


MODELS = {
    "gpt2-medium": (gpt2_medium, (1, 4, 8)),
    "llama-8b": (llama_8b, (1, 2)),
    "vit-large": (vit_large, (8, 32)),
}
"""Name -> the model, and the micro-batch sizes to measure."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--device", "kind", type=click.Choice(["cpu", "cuda"]), default="cuda")
@click.option("--cluster", help="Hardware profile to compare with  [default: the GPU found here]")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--largest", type=click.IntRange(min=1), help="Leave larger micro-batches out.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, help="For the profiles.")
def main(
    names: tuple[str, ...],
    kind: str,
    cluster: str | None,
    repeats: int,
    largest: int | None,
    folder: Path,
) -> None:
    """Measure, write and compare; all models by default."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no CUDA device here")
    modelled = resolve_cluster(cluster if kind == "cuda" else "cpu", 1).device(0)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    for name in names or MODELS:
        build, sizes = MODELS[name]
        used = [size for size in sizes if largest is None or size <= largest] or [1]
        measured = measure_model(
            build(),
            used,
            torch.device(kind),
            num_repeats=repeats,
            command=f"python benchmarks/gpu_layers.py {name} --device {kind} --repeats {repeats}",
        )
        write_profile(measured, folder / f"{name}-{modelled.name}.profile.yaml")
        _compare(console, measured, modelled)


def _compare(console: Console, measured: MeasuredModel, device: Device) -> None:
    table = Table(title=f"{measured.model_name} on {measured.device.name}")
    for column in (
        "size",
        "layer",
        "forward",
        "modelled",
        "backward",
        "modelled",
        "peak",
        "counted",
    ):
        table.add_column(column, justify="left" if column == "layer" else "right")
    times, memory = [], []
    for size in measured.sizes:
        for layer in size.layers:
            plain = replace(layer.profile, forward_seconds=None, backward_seconds=None)
            forward, backward = layer_seconds(plain, device)
            peak, counted = layer.peak_bytes, layer.counted_peak_bytes
            times.append((forward + backward) / (layer.forward.median + layer.backward.median))
            memory.append(counted / peak if peak else 1.0)
            table.add_row(
                str(size.micro_batch_size),
                f"{layer.layers[0]} x {len(layer.layers)}",
                f"{layer.forward.median * 1e3:.3f} ms",
                f"{forward * 1e3:.3f} ms",
                f"{layer.backward.median * 1e3:.3f} ms",
                f"{backward * 1e3:.3f} ms",
                f"{peak / 1e6:.1f} MB",
                f"{counted / 1e6:.1f} MB",
            )
    console.print(table)
    for what, ratios in (("layer time", times), ("allocated memory", memory)):
        deviation = statistics.median(abs(ratio - 1) for ratio in ratios)
        console.print(f"{what}, predicted against measured: median deviation {deviation:.1%}")


if __name__ == "__main__":
    main()
