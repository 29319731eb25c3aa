"""LOAD, FETCH, EVICT, RELEASE, SEND and RECEIVE: a rank's tensors come and go."""

from collections.abc import Callable

import torch

from planner.compute_type import cast_tensor
from planner.plan.names import kind_of
from planner.plan.types import Instruction
from runtime.handlers.host_update import evict_gradient
from runtime.handlers.words import describe, tensor_of
from runtime.layout import dense_stride, empty, flat, is_contiguous
from runtime.state import RankState

__all__ = ["evict", "fetch", "load", "receive", "release", "send"]


def load(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    assert instruction.micro_batch is not None
    micro_batch = instruction.micro_batch
    keys = [(tensor_of(name), name) for name in instruction.writes]
    precision = rank.plan.options.precision

    # In mixed precision only what is needed of the batch is cast, here.
    def run() -> None:
        for key, name in keys:
            rows = cast_tensor(rank.samples(key, micro_batch), precision)
            rank.buffers[name] = rows if rows.device == rank.device else rows.to(rank.device)

    def run_beside() -> None:
        rows = [cast_tensor(rank.samples(key, micro_batch), precision) for key, _ in keys]
        found, pending = rank.host.load(rows, rank.device)
        for (_, name), tensor in zip(keys, found, strict=True):
            rank.buffers[name] = tensor
        rank.buffers.pending(instruction, pending)

    return run_beside if rank.streams.is_asynchronous else run


def fetch(rank: RankState, instruction: Instruction) -> None:
    (source,), (target,) = instruction.reads, instruction.writes
    value, pending = rank.host.fetch(source)
    rank.put(target, value)
    rank.buffers.pending(instruction, pending)


def evict(rank: RankState, instruction: Instruction) -> None:
    (source,), (target,) = instruction.reads, instruction.writes
    if target.startswith("host:reduced:"):
        evict_gradient(rank, instruction)
        return
    rank.buffers.pending(instruction, rank.host.keep(target, rank.value(source)))


def release(rank: RankState, instruction: Instruction) -> None:
    (buffer,) = instruction.writes
    if kind_of(buffer) == "weights":
        rank.weights.release(buffer)
    elif kind_of(buffer) == "saved":
        rank.buffers[buffer].tensors.put(None)


def receive(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    peer, what = instruction.peer, describe(instruction)
    assert peer is not None
    (name,) = instruction.writes
    spec = rank.specs[tensor_of(name)]
    stride, dtype = dense_stride(spec.shape, spec.stride), getattr(torch, spec.dtype)
    is_vector = is_contiguous(spec.shape, stride)

    def run() -> None:
        tensor = torch.empty_strided(spec.shape, stride, dtype=dtype, device=rank.device)
        rank.buffers[name] = tensor
        vector = tensor if is_vector else flat(tensor)
        pending = rank.transport.receive(peer, vector, what)
        rank.buffers.pending(instruction, pending)

    return run


def send(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    peer, what = instruction.peer, describe(instruction)
    assert peer is not None
    (name,) = instruction.reads
    spec = rank.specs[tensor_of(name)]
    stride = dense_stride(spec.shape, spec.stride)
    is_vector = is_contiguous(spec.shape, stride)

    def run() -> None:
        tensor = rank.buffers[name]
        if tensor.stride() != stride:
            tensor = empty(spec, rank.device).copy_(tensor)
        vector = tensor if is_vector else flat(tensor)
        rank.sends.add(rank.transport.send(peer, vector, what), vector)

    return run
