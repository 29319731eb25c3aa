"""GATHER, REDUCE and REDUCE_TIED: weights and gradients between ranks."""

import torch

from planner.plan.types import Instruction
from runtime.handlers.words import describe
from runtime.state import RankState
from runtime.transport import Pending, Then

__all__ = ["gather", "reduce", "reduce_tied"]


def gather(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    (buffer,) = instruction.writes
    whole = rank.weights.hold(buffer, state) if rank.plan.gathers else state.whole
    if not state.partitioned:
        whole.copy_(state.shard)
        return
    # A copy in another type is cast where it belongs in the whole, and leaves from there.
    mine = state.cast_into(whole) if state.has_copy else state.shard
    pending = rank.transport.gather(mine, whole, describe(instruction))
    rank.buffers.pending(instruction, pending)


def reduce(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    state.detach_gradients()
    (target,) = instruction.writes
    total, adds = rank.total(state), target in instruction.reads
    # What is to be added is reduced inside the sum, which nobody reads any more.
    pending: Pending
    if state.divides_gradients:
        mine = slice(state.first, state.last)
        reduced = total[mine] if adds else total.new_empty(state.part_length)
        pending = rank.transport.reduce_scatter(total, reduced, describe(instruction))
    else:
        reduced = total if adds else torch.empty_like(total)
        pending = rank.transport.all_reduce(reduced, describe(instruction), total)
    if adds:
        so_far = rank.buffers[target]
        pending = Then(pending, lambda: so_far.add_(reduced))
    else:
        rank.buffers[target] = reduced
    rank.buffers.pending(instruction, pending)


def reduce_tied(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    state.detach_gradients()
    (source,), (target,) = instruction.reads, instruction.writes
    if source != target:
        rank.buffers[target] = rank.total(state).clone()
    pending = rank.transport.all_reduce_tied(
        rank.buffers[target], state.unit.ranks, describe(instruction)
    )
    rank.buffers.pending(instruction, pending)
