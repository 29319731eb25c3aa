"""The options of `lga-plan` as click takes them.

Knows names, kinds and help. What they ask together, and what contradicts what, is known to
`planner.cli.plan_request`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from planner.any_schedule import OTHER_SCHEDULES
from planner.batch import BatchRange
from planner.cluster.resolve import DEFAULT_CLUSTER
from planner.console import DEVICES, NORM, SAMPLES, SECONDS, SEED, Count, Positive
from planner.model_file import DEFAULT_SEQUENCE_LENGTH
from planner.precision import Precision
from planner.prepare import DEFAULT_SAMPLES_PER_DEVICE
from planner.schedules import OrderSearch, Schedule

__all__ = ["plan_options"]


class _Batch(click.ParamType[BatchRange]):
    """A number of samples, or two with `..` between them."""

    name = "batch"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> BatchRange:
        ends = [end.strip() for end in str(value).split("..")]
        if len(ends) > 2 or not all(re.fullmatch(r"[+-]?\d+", end) for end in ends):
            what = "a range with an end missing" if "" in ends else "no number and no range"
            self.fail(f"{value!r} is {what}: {_FORMS}", param, ctx)
        for end in ends:
            if not 1 <= int(end) <= SAMPLES.most:
                words = f"{end} is not a number of samples from 1 to {SAMPLES.most}"
                self.fail(f"{value}: {words}; {_FORMS}", param, ctx)
        least, most = int(ends[0]), int(ends[-1])
        if least > most:
            words = f"{least} is more than {most}; write {most}..{least}"
            self.fail(f"{value} is upside down: {words}.", param, ctx)
        return BatchRange(least=least, most=most)


_FORMS = "write a number of samples as in 64, or both ends of a range as in 8..64."


class _Within(click.ParamType[int | str]):
    """A number of replicas, or `host`."""

    name = "host|number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "host" if value == "host" else DEVICES.convert(value, param, ctx)


_WHAT = (
    click.argument("model"),
    click.option("--gpus", type=DEVICES, required=True, help="Devices to plan for."),
    click.option(
        "--cluster",
        help="A device in its usual hosts (a100-80, h100-sxm, ...), `cpu` for processes of this "
        "machine, or a cluster file ending in .yaml  [default: this machine's GPUs, else "
        f"{DEFAULT_CLUSTER}]",
    ),
    click.option(
        "--profile",
        type=click.Path(path_type=Path),
        help="File of lga-profile: layers take what was measured on this kind of device.",
    ),
    click.option(
        "--sequence-length",
        type=SAMPLES,
        help="Tokens per sample, where MODEL is a config.json  "
        f"[default: {DEFAULT_SEQUENCE_LENGTH}, or the model's positions if it has fewer]",
    ),
)
_BATCH = (
    click.option(
        "--global-batch",
        "--batch-size",
        type=_Batch(),
        metavar="N|A..B",
        help="Samples per step, over all devices, or a range to choose from by the time per "
        "sample  [default: what the other options imply, else "
        f"{DEFAULT_SAMPLES_PER_DEVICE} per device]",
    ),
    click.option(
        "--critical-batch",
        is_flag=True,
        help="As many samples per step as a transformer of this many parameters can use, by our "
        "calculation from a published family of models.",
    ),
    click.option(
        "--steps",
        "num_steps",
        type=Count(1 << 40),
        help="Length of the training: print its hours and GPU-hours.",
    ),
    click.option(
        "--tokens", "num_tokens", type=Positive("number"), help="The same in tokens: 300e9."
    ),
    click.option(
        "--samples", "num_samples", type=Positive("number"), help="The same in samples: 1e6."
    ),
    click.option(
        "--price", type=Positive("number"), help="Of one GPU-hour: print the training's cost."
    ),
)
_PLACEMENT = (
    click.option("--micro-batch-size", type=SAMPLES, help="Samples per micro-batch."),
    click.option("--micro-batches", type=SAMPLES, help="Micro-batches per replica and step."),
    click.option("--replicas", type=DEVICES, help="Data-parallel replicas of the pipeline."),
    click.option("--pipeline-ranks", type=DEVICES, help="Devices in the pipeline of one replica."),
    click.option(
        "--stages-per-rank",
        type=SAMPLES,
        help="Times that the pipeline goes round all its devices.",
    ),
    click.option(
        "--assignment",
        type=click.Choice(["modular", "any"]),
        default="any",
        show_default=True,
        help="Stage s on device s mod P of the pipeline, or on whichever is fastest; modular where "
        "--stages-per-rank is given.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(["any", *map(str, (Schedule.LAYERED, *OTHER_SCHEDULES, *OrderSearch))]),
        default="any",
        show_default=True,
        help="Order of compute; any: the fastest of them; best: orders of no family too, by a "
        "constraint solver; best-layered: of those that keep to the layered rule in backward.",
    ),
    click.option(
        "--partition",
        type=click.Choice(["0", "1", "2", "3"]),
        help="What replicas divide among them instead of holding it whole: 1 optimizer state, 2 "
        "and gradients, 3 and weights; 0 nothing.",
    ),
    click.option(
        "--partition-within",
        type=_Within(),
        help="Divide it among the replicas of a host, or so many, and keep all of it in every such "
        "group  [default: among all replicas or those of a host]",
    ),
    click.option(
        "--recompute/--no-recompute",
        default=None,
        help="Keep only the inputs of stages and run forward again before backward, or keep all "
        "activations.",
    ),
    click.option(
        "--offload-state/--no-offload-state",
        default=None,
        help="Keep weights and optimizer state in host memory, and fetch them when they are used.",
    ),
    click.option(
        "--offload-inputs/--no-offload-inputs",
        default=None,
        help="Keep stored inputs of stages in host memory between forward and backward.",
    ),
    click.option(
        "--buffers",
        "num_buffers",
        type=Count(64),
        help="Stages whose gathered weights a device holds at once; gradients likewise.",
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        help="Memory to use per device, such as 40GB or 512MiB  [default: the device's memory, "
        "less what is reserved]",
    ),
)
_STEP = (
    click.option(
        "--clip-norm",
        type=NORM,
        help="Scale the gradient down to this norm over the whole model. All updates then stand at "
        "the end of the step.",
    ),
    click.option(
        "--clip-delayed",
        is_flag=True,
        help="Scale by what the norm of the step before asks for (the first step not at all), so "
        "that updates need not wait for the end of the step.",
    ),
    click.option(
        "--check-finite",
        is_flag=True,
        help="Update nothing in a step with a gradient that is not finite. All updates then stand "
        "at the end of the step.",
    ),
    click.option(
        "--update-on",
        type=click.Choice(["device", "host"]),
        default="device",
        show_default=True,
        help="Where the optimizer steps. host: on weights and optimizer state that stay in host "
        "memory (it implies --offload-state, with partition 0 or 3); gradients alone go down to "
        "it, and compute goes on meanwhile.",
    ),
    click.option(
        "--precision",
        type=click.Choice([precision.value for precision in Precision]),
        default=Precision.MODEL.value,
        show_default=True,
        help="Type to compute in; model: as the model file builds it. Others are mixed: weights, "
        "gradients, their sums and the optimizer stay in float32. float16 scales the loss, and "
        "checks that gradients are finite.",
    ),
    click.option(
        "--keep-float32",
        multiple=True,
        metavar="PATTERN",
        help="Parameters, such as '*.norm.*', whose modules compute in float32 in mixed precision; "
        "may be given more than once, and adds to the model file's keep_float32.",
    ),
)
_SEARCH = (
    click.option(
        "--time-limit",
        type=SECONDS,
        default=20.0,
        show_default=True,
        help="Longest that the solver may search, for each batch of a range.",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=0,
        show_default=True,
        help="Of the solver, and of the run: weights, order of samples, dropout.",
    ),
    click.option(
        "--output",
        type=click.Path(path_type=Path),
        help="File to write the plan to  [default: MODEL's name with .plan.yaml, in this folder]",
    ),
)


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the options, under the names of PlanRequest's fields."""
    for option in reversed((*_WHAT, *_BATCH, *_PLACEMENT, *_STEP, *_SEARCH)):
        command = option(command)
    return command
