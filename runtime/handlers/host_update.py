"""UPDATE on the host, and the EVICT of the gradient that it needs.

The state lives in host memory, and the optimizer has it for the time of its step alone. What users
watch, they watch in the thread that runs the program; the rest is done beside it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from planner.plan.names import kind_of
from planner.plan.types import Instruction
from runtime.handlers.squares import square
from runtime.handlers.words import describe
from runtime.hooks import not_finite
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
    ready: list[Callable[[], None]] = []
    taken: dict[str, Any] = {}
    for name in instruction.reads:
        if name in _VERDICTS:
            rank.host.keep(f"host:{name}", rank.buffers[name])
        place = name if kind_of(name) == "host" else f"host:{name}"
        taken[name], settle = rank.host.take(place)
        ready.append(settle)
    unit = state.unit.name
    gradient = taken[f"host:reduced:{unit}"]
    inverse = None if rank.loss_scale is None else 1 / rank.loss_scale.scale
    observer = rank.observer

    def begin() -> None:
        for settle in ready:
            settle()
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
    taken: dict[str, Any],
) -> None:
    """In the thread of updates: all that is taken is there, and used by nothing else."""
    unit = state.unit.name
    shard, moments = taken[f"host:shard:{unit}"], taken[f"host:moments:{unit}"]
    for name in instruction.writes:
        if kind_of(name) == "square":
            rank.buffers[name] = square(rank, state, gradient)
    if "finite" not in taken or bool(taken["finite"]):
        for name in ("scale", "clip:scale"):
            if name in taken:
                gradient.mul_(taken[name])
        if rank.plan.options.save:  # the last checkpoint stays as it is
            shard, moments = rank.host.renewed(shard), rank.host.renewed(moments)
        moments = _step(rank, state, gradient, shard, moments)
    else:
        rank.not_finite += not_finite(state, gradient)
    rank.host.put(f"host:shard:{unit}", shard)
    rank.host.put(f"host:moments:{unit}", moments)


def _step(
    rank: RankState, state: UnitState, gradient: Tensor, shard: Tensor, moments: dict[str, Any]
) -> dict[str, Any]:
    """The shard is changed; what the optimizer then keeps is returned."""
    optimizer = rank.optimizers[state.unit.name]
    state.attach_pieces(shard)
    optimizer.put_moments(moments)
    state.attach_piece_gradients(gradient)
    optimizer.step()
    optimizer.release_gradients()
    kept = optimizer.moments
    optimizer.put_moments({})
    state.attach_pieces(None)
    return kept
