"""Compiles a rank's stages before its first step, on made-up tensors.

All ranks compile at once, instead of one after the other as the first micro-batch reaches them, and
steps then compile nothing. Every stage runs twice: what is compiled anew the second time would be
at every call, and runs eagerly from then on. This module knows stages. It knows nothing of
transfers but how to wait for all ranks.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from planner.graph import TensorSpec
from runtime.compile import Compiler, CompileReport, EagerPart, Phase
from runtime.gathering import gather_objects, sum_over_ranks
from runtime.layout import empty, with_traced_layout
from runtime.stage import Stage
from runtime.state import RankState

__all__ = ["warm_up"]

_LOCK = threading.Lock()
"""Ranks may share a process (`runtime.local`), and torch traces one graph at a time."""
_MOST_GRAPHS = 1_000_000
"""Of one class of layers. Torch's own limit is meant for shapes that change in a loop."""


def warm_up(
    rank: RankState, compiler: Compiler, world_rank: int, *, training: bool
) -> CompileReport:
    """Compile what this rank's stages call, in training or in evaluation; a collective.

    Modules must be in the mode of the programs that are to run.

    Raises:
        RunError: a rank was lost, or took longer than the others by more than the deadline.
    """
    transport, num_ranks = rank.transport, rank.plan.world_size
    sum_over_ranks(transport, [0], rank.device, "the compilation's start")
    stages = [stage for stage in rank.stages.values() if stage.compiled]
    with (
        _LOCK,
        warnings.catch_warnings(),
        torch._dynamo.config.patch(
            recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=_MOST_GRAPHS
        ),
    ):
        # Dynamo itself looks for the gradient of an input, which need be no leaf.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        for phase in (Phase.COMPILING, Phase.CHECKING):
            compiler.phase = phase
            for stage in stages:
                _try_out(rank, stage, training=training)
    compiler.phase = Phase.READY
    mine = compiler.num_graphs, _eager_parts(rank)
    what = "the compilation's end"
    found = gather_objects(transport, mine, world_rank, num_ranks, rank.device, what)
    parts = dict.fromkeys(part for _, parts in found for part in parts)
    return CompileReport(
        backend=compiler.backend,
        num_graphs=tuple(number for number, _ in found),
        eager=tuple(sorted(parts, key=lambda part: (part.stage, part.what))),
    )


def _try_out(rank: RankState, stage: Stage, *, training: bool) -> None:
    specs = {spec.name: spec for spec in rank.plan.batch}
    with _weights(rank, stage):
        inputs = {name: _zeros(rank, rank.specs[name]) for name in stage.plan.inputs}
        batch = {key: empty(specs[key], rank.device).zero_() for key in stage.plan.batch_keys}
        try:
            stage.try_out(inputs, batch, training=training)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            for compiled in stage.compiled:
                compiled.give_up(error)


def _zeros(rank: RankState, spec: TensorSpec) -> Tensor:
    """Valid as numbers, as classes and as indices."""
    return with_traced_layout(empty(spec, rank.device).zero_(), spec)


@contextmanager
def _weights(rank: RankState, stage: Stage) -> Iterator[None]:
    """The stage's parameters hold weights, zeros where they are gathered in steps, and in the end
    what they held, and no gradient."""
    units = [rank.units[name] for name in stage.plan.units]
    held = [(p, p.data) for state in units for p in state.parameters.values()]
    if rank.plan.gathers:
        for state in units:
            dtype = getattr(torch, state.weights_dtype)
            state.attach_weights(torch.zeros(state.padded_length, dtype=dtype, device=rank.device))
    try:
        yield
    finally:
        for state in units:
            state.detach_gradients()
        for parameter, data in held:
            parameter.data = data


def _eager_parts(rank: RankState) -> tuple[EagerPart, ...]:
    whole = [
        EagerPart(stage=index, what="", reason=why) for index, why in rank.eager_stages.items()
    ]
    parts = [
        EagerPart(stage=index, what=compiled.name, reason=compiled.reason)
        for index, stage in rank.stages.items()
        for compiled in stage.compiled
        if compiled.reason
    ]
    return (*whole, *parts)
