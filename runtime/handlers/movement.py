"""LOAD, FETCH, EVICT, RELEASE, SEND and RECEIVE: a rank's tensors come and go."""

from planner.plan.names import kind_of
from planner.plan.types import Instruction
from runtime.handlers.words import describe, tensor_of
from runtime.layout import dense_stride, empty, flat
from runtime.state import RankState

__all__ = ["evict", "fetch", "load", "receive", "release", "send"]


def load(rank: RankState, instruction: Instruction) -> None:
    assert instruction.micro_batch is not None
    size = rank.plan.micro_batch_size
    first = instruction.micro_batch * size
    for name in instruction.writes:
        rows = rank.batch[tensor_of(name)][first : first + size]
        rank.buffers[name] = rows.to(rank.device, non_blocking=True)


def fetch(rank: RankState, instruction: Instruction) -> None:
    (source,), (target,) = instruction.reads, instruction.writes
    value, pending = rank.host.fetch(source)
    rank.put(target, value)
    rank.buffers.pending(instruction, pending)


def evict(rank: RankState, instruction: Instruction) -> None:
    (source,), (target,) = instruction.reads, instruction.writes
    rank.buffers.pending(instruction, rank.host.keep(target, rank.value(source)))


def release(rank: RankState, instruction: Instruction) -> None:
    (buffer,) = instruction.writes
    if kind_of(buffer) == "weights":
        rank.weights.release(buffer)
    elif kind_of(buffer) == "saved":
        rank.buffers[buffer].tensors.put(None)


def receive(rank: RankState, instruction: Instruction) -> None:
    assert instruction.peer is not None
    (name,) = instruction.writes
    tensor = empty(rank.specs[tensor_of(name)], rank.device)
    rank.buffers[name] = tensor
    pending = rank.transport.receive(instruction.peer, flat(tensor), describe(instruction))
    rank.buffers.pending(instruction, pending)


def send(rank: RankState, instruction: Instruction) -> None:
    assert instruction.peer is not None
    (name,) = instruction.reads
    spec, tensor = rank.specs[tensor_of(name)], rank.buffers[name]
    if tensor.stride() != dense_stride(spec.shape, spec.stride):
        tensor = empty(spec, rank.device).copy_(tensor)
    vector = flat(tensor)
    pending = rank.transport.send(instruction.peer, vector, describe(instruction))
    rank.sends.add(pending, vector)
