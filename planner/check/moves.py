"""What LOAD, FETCH, EVICT, RELEASE, SEND and RECEIVE must find, and what they leave."""

from planner.check.data import evict_gradient
from planner.check.symbols import NAMED, State, describe
from planner.plan.names import buffer_key, kind_of
from planner.plan.types import Instruction, Opcode

__all__ = ["run_copy", "run_load", "run_release", "run_transfer"]


def run_load(state: State, rank: int, instruction: Instruction) -> None:
    """Each written buffer then holds its key and micro-batch."""
    suffix = f".{instruction.micro_batch}"
    written = instruction.writes
    good = all(b.startswith("batch:") and b == buffer_key(b) + suffix for b in written)
    if instruction.reads or not good or not written or len(set(written)) < len(written):
        message = f"{describe(instruction)} must read nothing and write keys of that part of the "
        message += f"batch, but reads {' '.join(instruction.reads) or 'nothing'} and writes "
        state.fail(5, message + (" ".join(written) or "nothing"), rank)
    state.held[rank].update(dict.fromkeys(written, NAMED))


def run_copy(state: State, rank: int, instruction: Instruction) -> None:
    """FETCH and EVICT: the content is copied between a buffer and its host copy.

    Where updates run on the host, EVICT brings gradients there too.
    """
    held, evicts = state.held[rank], instruction.opcode is Opcode.EVICT
    if evicts and instruction.writes == (f"host:reduced:{instruction.unit}",):
        evict_gradient(state, rank, instruction)
        return
    device, host = instruction.reads, instruction.writes
    if not evicts:
        device, host = host, device
    state.find_reads(rank, instruction)
    movable = len(device) == 1 and _may_leave(state, instruction, device[0])
    if not movable or host != (f"host:{device[0]}",):
        message = f"{describe(instruction)} must move its shard, moments, boundary tensor, batch or"
        message += f" saved, but reads {' '.join(instruction.reads) or 'nothing'} and writes "
        state.fail(5, message + (" ".join(instruction.writes) or "nothing"), rank)
    elif evicts:
        if device[0] in held:
            held[host[0]] = held[device[0]]
    elif host[0] in held:
        held[device[0]] = held[host[0]]


def run_release(state: State, rank: int, instruction: Instruction) -> None:
    """A pool buffer of weights that must hold the unit, or one that may be evicted, is emptied."""
    buffers = instruction.reads
    state.find_reads(rank, instruction)
    is_pool = len(buffers) == 1 and buffers[0].startswith("weights:")
    if is_pool and not state.plan.gathers:
        state.fail(5, f"RELEASE of {instruction.unit}, whose weights stay in place", rank)
    elif len(buffers) != 1 or not (is_pool or _may_leave(state, instruction, buffers[0])):
        message = f"{describe(instruction)} must release one buffer of its unit or micro-batch, "
        state.fail(5, message + f"but reads {' '.join(buffers) or 'nothing'}", rank)
    if instruction.writes != buffers:
        message = f"{describe(instruction)} must write what it reads, "
        state.fail(5, message + f"but writes {' '.join(instruction.writes) or 'nothing'}", rank)
    for buffer in buffers:
        if is_pool:
            state.need(rank, buffer, instruction.unit or "")
        state.held[rank].pop(buffer, None)


def run_transfer(state: State) -> None:
    """What SEND reads is what RECEIVE writes; an end without a partner moves nothing."""
    (rank, index), *receivers = state.cells
    instruction = state.plan.programs[rank][index]
    if instruction.opcode is Opcode.RECEIVE:
        return
    state.find_reads(rank, instruction)
    content = state.held[rank].get(instruction.reads[0])
    for receiver, position in receivers:
        for buffer in state.plan.programs[receiver][position].writes:
            if content is not None:
                state.held[receiver][buffer] = content


def _may_leave(state: State, instruction: Instruction, buffer: str) -> bool:
    """Whether the buffer is one that may live on the host, and the instruction says whose it is.

    A shard that is a part of whole weights stays with them.
    """
    kind, _, subject = buffer.partition(":")
    if kind == "shard" and state.plan.gathers_updates:
        return False
    if kind in ("shard", "moments"):
        return subject == instruction.unit
    if kind_of(buffer) not in ("", "batch", "saved"):
        return False
    key = buffer_key(buffer)
    return (
        key not in ("loss", "", "finite", "scale") and buffer == f"{key}.{instruction.micro_batch}"
    )
