"""CHECK_FINITE, CLIP, UPDATE and SAVE: from whole gradients to the next state.

The norm of the whole model's gradient is the square root of the sum of the squares of the norms of
all units, as torch.nn.utils.clip_grad_norm_ takes it over parameters. Where clipping is delayed,
updates leave the squares, and CLIP finds the factor of the next step. Every element counts once:
parts of the first partition group where the gradient is partitioned, else replica 0's; of tied
units the lowest rank's.
"""

import torch

from planner.plan.names import kind_of
from planner.plan.types import Instruction
from runtime.handlers.host_update import update_on_host
from runtime.handlers.squares import square
from runtime.handlers.words import describe
from runtime.hooks import not_finite
from runtime.state import RankState
from runtime.transport import Then

__all__ = ["check_finite", "clip", "save", "update"]


def check_finite(rank: RankState, instruction: Instruction) -> None:
    (target,) = instruction.writes
    num_bad = torch.zeros(1, dtype=torch.float64, device=rank.device)
    for _, gradient in rank.gradients(instruction):
        # The largest element, which NaN passes through: unlike isfinite() it needs no memory.
        num_bad += ~torch.linalg.vector_norm(gradient, torch.inf).isfinite()
    finite = torch.empty_like(num_bad[0], dtype=torch.bool)
    rank.buffers[target] = finite
    pending = rank.transport.all_reduce_world(num_bad, describe(instruction))

    def finish() -> None:
        finite.copy_(num_bad[0] == 0)
        rank.is_finite = rank.streams.figure(finite)

    rank.buffers.pending(instruction, Then(pending, finish))


def clip(rank: RankState, instruction: Instruction) -> None:
    (target,) = instruction.writes
    limit = rank.plan.options.clip_norm
    assert limit is not None, "CLIP in a plan without clip_norm"
    squares = torch.zeros(1, dtype=torch.float64, device=rank.device)
    for state, gradient in rank.gradients(instruction):
        squares += square(rank, state, gradient)
    for name in instruction.reads:
        if kind_of(name) == "square":
            squares += rank.buffers[name]
    norm = torch.empty_like(squares[0])
    rank.buffers[target] = scale = torch.empty_like(norm, dtype=torch.float32)

    def finish() -> None:
        norm.copy_(squares[0].sqrt())
        if rank.loss_scale is not None:
            norm.div_(rank.loss_scale.scale)
        scale.copy_(torch.clamp(limit / (norm + 1e-6), max=1.0))  # torch's own formula
        rank.gradient_norm = rank.streams.figure(norm)

    pending = rank.transport.all_reduce_world(squares, describe(instruction))
    rank.buffers.pending(instruction, Then(pending, finish))


def update(rank: RankState, instruction: Instruction) -> None:
    if instruction.stream == "host":
        update_on_host(rank, instruction)
        return
    state = rank.unit(instruction)
    ((_, reduced),) = rank.gradients(instruction)
    gradient = state.my_part(reduced)
    if rank.loss_scale is not None:
        gradient.mul_(1 / rank.loss_scale.scale)
    if rank.observer is not None:
        rank.observer(state, gradient)
    state.detach_gradients()
    optimizer = rank.optimizers[state.unit.name]
    for name in instruction.writes:
        if kind_of(name) == "square":
            rank.buffers[name] = square(rank, state, reduced)
    if "finite" not in instruction.reads or rank.is_finite is None or rank.is_finite():
        for name in ("scale", "clip:scale"):
            if name in instruction.reads:
                gradient.mul_(rank.buffers[name])
        views = rank.sums.piece_views(state, rank.sum_of(state), gradient)
        state.attach_piece_gradients(views)
        optimizer.step()
        optimizer.release_gradients()
        if state.has_copy and not state.gathered and not state.partitioned:
            state.cast_into(state.whole)
    else:
        rank.not_finite += not_finite(state, gradient)


def save(rank: RankState, instruction: Instruction) -> None:
    for source in instruction.reads:
        rank.buffers.pending(instruction, rank.host.keep(f"host:{source}", rank.value(source)))
