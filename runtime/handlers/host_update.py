"""UPDATE on the host, and the EVICT of the gradient that it needs.

The state lives in host memory, and the optimizer has it for the time of its step alone. What users
watch, they watch in the thread that runs the program; the rest is done beside it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from planner.plan.names import kind_of
from planner.plan.types import Instruction
from runtime.handlers.squares import square
from runtime.handlers.words import describe
from runtime.hooks import not_finite
from runtime.host import Taken
from runtime.shards import UnitState
from runtime.state import RankState

__all__ = ["evict_gradient", "update_on_host"]

_VERDICTS = ("finite", "scale", "clip:scale")


def evict_gradient(rank: RankState, instruction: Instruction) -> None:
    (target,) = instruction.writes
    ((state, gradient),) = rank.gradients(instruction)
    state.detach_gradients()
    rank.buffers.pending(instruction, rank.host.keep(target, state.my_part(gradient)))


def update_on_host(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    taken: dict[str, Taken] = {}
    for name in instruction.reads:
        if name in _VERDICTS:
            rank.host.keep(f"host:{name}", rank.buffers[name])
        place = name if kind_of(name) == "host" else f"host:{name}"
        taken[name] = rank.host.take(place)
    gradient: Tensor = taken[f"host:reduced:{state.unit.name}"].value
    inverse = None if rank.loss_scale is None else 1 / rank.loss_scale.scale
    observer = rank.observer

    def begin() -> None:
        for each in taken.values():
            each.settle()
        if inverse is not None:
            gradient.mul_(inverse)

    def run() -> None:
        if observer is None:
            begin()
        _update(rank, state, instruction, gradient, taken)

    if observer is not None:
        begin()
        observer(state, gradient)
    rank.buffers.pending(instruction, rank.host_updates.submit(run, describe(instruction)))


def _update(
    rank: RankState,
    state: UnitState,
    instruction: Instruction,
    gradient: Tensor,
    taken: Mapping[str, Taken],
) -> None:
    """In the thread of updates: all that is taken is there, and used by nothing else."""
    names = f"host:shard:{state.unit.name}", f"host:moments:{state.unit.name}"
    used = list(taken.values())
    shard, moments = (taken[name].value for name in names)
    for name in instruction.writes:
        if kind_of(name) == "square":
            rank.buffers[name] = square(rank, state, gradient)
    if "finite" not in taken or bool(taken["finite"].value):
        for name in ("scale", "clip:scale"):
            if name in taken:
                gradient.mul_(taken[name].value)
        if rank.plan.options.save:  # the last checkpoint stays as it is
            again = [rank.host.renewed(taken[name]) for name in names]
            used += again
            shard, moments = (each.value for each in again)
        moments = _step(rank, state, gradient, shard, moments)
    else:
        rank.not_finite += not_finite(state, gradient)
    rank.host.put(dict(zip(names, (shard, moments), strict=True)), used)


def _step(
    rank: RankState, state: UnitState, gradient: Tensor, shard: Tensor, moments: dict[str, Any]
) -> dict[str, Any]:
    """The shard is changed; what the optimizer then keeps is returned."""
    optimizer = rank.optimizers[state.unit.name]
    state.attach_pieces(shard)
    optimizer.put_moments(moments)
    state.attach_piece_gradients(state.piece_views(gradient))
    optimizer.step()
    optimizer.release_gradients()
    kept = optimizer.moments
    optimizer.put_moments({})
    state.attach_pieces(None)
    return kept
