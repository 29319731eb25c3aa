"""`lga-profile`: measure the layers of a model on a device, links of a cluster, or fit a device.

Knows which of the three the command line asks for, and the first of them.
"""

import importlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from planner.console import (
    DEVICES,
    HELP,
    SAMPLES,
    Count,
    check_can_write,
    command_errors,
    console,
    error_console,
)
from planner.model_file import DEFAULT_SEQUENCE_LENGTH, load_model_file
from planner.precision import Precision

__all__ = ["main"]

_OTHERS = {
    "--cluster": "planner.cli.profile_cluster",
    "--calibrate": "planner.cli.profile_calibrate",
}
"""Option -> the module whose `main` takes the whole command line, this option included."""


class _ByOption(click.Command):
    """A command that hands the command line over where one of `_OTHERS` stands in it.

    Each of them has options and a help page of its own.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        for option, module in _OTHERS.items():
            if any(word == option or word.startswith(f"{option}=") for word in args):
                other: click.Command = importlib.import_module(module).main
                return other.make_context(info_name, args, parent, **extra)
        words = [info_name or "lga-profile", *args]
        context = super().make_context(info_name, args, parent, **extra)
        context.obj = shlex.join(words)  # for the file: how it was made
        return context

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers of samples, with commas between them."""
    return tuple(sorted({SAMPLES.convert(word, param, ctx) for word in value.split(",")}))


@click.command(cls=_ByOption, context_settings=HELP)
@click.argument("model")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device to measure on  [default: cuda where torch finds one, else cpu]",
)
@click.option(
    "--micro-batch-size",
    "micro_batch_sizes",
    callback=_sizes,
    metavar="INTEGER[,INTEGER...]",
    default="1",
    show_default=True,
    help="Samples per micro-batch; several sizes with commas between them.",
)
@click.option(
    "--sequence-length",
    type=SAMPLES,
    help="Tokens per sample, where MODEL is a config.json  "
    f"[default: {DEFAULT_SEQUENCE_LENGTH}, or the model's positions if it has fewer]",
)
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.MODEL.value,
    show_default=True,
    help="Type to compute in, as lga-plan takes it.",
)
@click.option(
    "--keep-float32",
    multiple=True,
    metavar="PATTERN",
    help="Parameters whose modules compute in float32 all the same; may be given more than once.",
)
@click.option(
    "--repeats",
    type=Count(10_000),
    default=10,
    show_default=True,
    help="Runs of each layer that count, after some to warm up.",
)
@click.option(
    "--threads", type=DEVICES, default=1, show_default=True, help="Threads of torch on a CPU."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write the profile to  [default: MODEL's name with .profile.yaml, in this folder]",
)
@click.pass_obj
@command_errors()
def main(
    command: str,
    model: str,
    device: str | None,
    micro_batch_sizes: tuple[int, ...],
    sequence_length: int | None,
    precision: str,
    keep_float32: tuple[str, ...],
    repeats: int,
    threads: int,
    output: Path | None,
) -> None:
    """Time every distinct layer of MODEL on a device.

    MODEL is a Python file or module, or the config.json of a causal language model of the
    transformers library.

    Forward, backward, recomputation and update of a layer are medians of several runs; its peak
    memory is measured too. `lga-plan MODEL --profile FILE` plans with what was measured. Nothing
    is written unless all layers have been measured.

    \b
    lga-profile --cluster --help         links and collectives between ranks
    lga-profile --calibrate CSV --help   a device's parameters from measured step times
    """
    # They load torch, which the other commands of this name may not need.
    from planner.measure.file import write_profile
    from planner.measure.here import default_device_kind, find_device
    from planner.measure.session import measure_model
    from planner.report.layers import layer_lines, layer_table

    model_file = load_model_file(model, sequence_length=sequence_length)
    path = output if output is not None else Path(f"{model_file.name}.profile.yaml")
    check_can_write(path, "--output", [model_file.path])
    found = find_device(device or default_device_kind(), threads)
    with _layer_bar() as show:
        measured = measure_model(
            model_file,
            micro_batch_sizes,
            found,
            num_repeats=repeats,
            command=command,
            on_layer=show,
            precision=Precision(precision),
            keep_float32=keep_float32,
        )
    write_profile(measured, path)
    for line in layer_lines(measured):
        console.print(Text(line), soft_wrap=True)
    for size in measured.sizes:
        console.print(layer_table(size))
    console.print(Text(f"profile   written to {path}"), soft_wrap=True)


@contextmanager
def _layer_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar; what it yields hears of each layer: number, of how many, name."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=error_console,
        transient=True,
    ) as progress:
        task = progress.add_task("tracing", total=None)

        def show(number: int, total: int, layer: str) -> None:
            progress.update(task, completed=number, total=total, description=layer)

        yield show
