"""What each instruction does: one function per instruction, over the rank's state."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from planner.plan.types import Instruction, Opcode
from runtime.layout import dense_stride, empty, flat, with_traced_layout
from runtime.shards import UnitState
from runtime.state import RankState

__all__ = ["HANDLERS"]


def _load(rank: RankState, instruction: Instruction) -> None:
    assert instruction.micro_batch is not None
    size = rank.plan.micro_batch_size
    first = instruction.micro_batch * size
    for name in instruction.writes:
        key = _tensor_of(name)
        rows = rank.batch[key][first : first + size]
        rank.buffers[name] = rows.to(rank.device, non_blocking=True)


def _gather(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    (buffer,) = instruction.writes
    whole = rank.weights.hold(buffer, state)
    state.attach_weights(whole)
    pending = rank.transport.gather(state.shard, whole, _describe(instruction))
    rank.buffers.pending(instruction, pending)


def _release(rank: RankState, instruction: Instruction) -> None:
    rank.unit(instruction).detach_weights()


def _receive(rank: RankState, instruction: Instruction) -> None:
    assert instruction.peer is not None
    (name,) = instruction.writes
    tensor = empty(rank.specs[_tensor_of(name)], rank.device)
    rank.buffers[name] = tensor
    pending = rank.transport.receive(instruction.peer, flat(tensor), _describe(instruction))
    rank.buffers.pending(instruction, pending)


def _send(rank: RankState, instruction: Instruction) -> None:
    assert instruction.peer is not None
    (name,) = instruction.reads
    spec, tensor = rank.specs[_tensor_of(name)], rank.buffers[name]
    if tensor.stride() != dense_stride(spec.shape, spec.stride):
        tensor = empty(spec, rank.device).copy_(tensor)
    vector = flat(tensor)
    pending = rank.transport.send(instruction.peer, vector, _describe(instruction))
    rank.sends.add(pending, vector)


def _forward(rank: RankState, instruction: Instruction) -> None:
    stage = rank.stage(instruction)
    inputs, batch = _stage_inputs(rank, instruction)
    if stage.plan.recompute:
        outputs = stage.forward(inputs, batch)
    else:
        with _saved_tensor_hooks(rank):
            outputs, saved = stage.forward_saving(inputs, batch)
        rank.buffers[_saved_name(instruction)] = saved
    assert instruction.micro_batch is not None
    for name, value in outputs.items():
        rank.buffers[f"{name}.{instruction.micro_batch}"] = rank.weights.apart(value)
    if "loss" in outputs:
        rank.losses[instruction.micro_batch] = outputs["loss"]


def _recompute(rank: RankState, instruction: Instruction) -> None:
    inputs, batch = _stage_inputs(rank, instruction)
    rank.buffers[_saved_name(instruction)] = rank.stage(instruction).recompute(inputs, batch)


def _backward(rank: RankState, instruction: Instruction) -> None:
    stage = rank.stage(instruction)
    gradients = {
        _tensor_of(name): rank.buffers[name]
        for name in instruction.reads
        if name.startswith("gradient:")
    }
    if "loss" in stage.plan.outputs:
        assert instruction.micro_batch is not None
        loss = rank.losses[instruction.micro_batch]
        gradients["loss"] = torch.ones_like(loss) / rank.num_losses
    units = [rank.units[name] for name in stage.plan.units if rank.units[name].unit.trainable]
    for state in units:
        _prepare_gradients(rank, state, instruction)
    parts = [
        (state.parameters[key], part)
        for state in units
        if (name := _part_name(state, instruction)) in instruction.reads
        for key, part in rank.buffers[name].items()
    ]
    found = stage.backward(rank.buffers[_saved_name(instruction)], gradients, parts)
    for state in units:
        if state.unit.exact:
            _hand_on_part(rank, state, instruction)
    for name in instruction.writes:
        if name.startswith("gradient:"):
            tensor = _tensor_of(name)
            gradient = found.get(tensor)
            if gradient is None:  # the stage reads it, but no path of the loss goes through
                gradient = empty(rank.specs[tensor], rank.device).zero_()
            rank.buffers[name] = gradient


def _prepare_gradients(rank: RankState, state: UnitState, instruction: Instruction) -> None:
    """Point the parameters at their accumulation buffer, and zero it where it starts anew."""
    name = rank.sum_of[state.unit.name]
    if name not in instruction.writes:
        return
    total = rank.total(state)
    if name not in instruction.reads:
        total.zero_()
    if not state.unit.exact:
        state.attach_gradients(total)


def _part_name(state: UnitState, instruction: Instruction) -> str:
    return f"part:{state.unit.name}.{instruction.micro_batch}"


def _hand_on_part(rank: RankState, state: UnitState, instruction: Instruction) -> None:
    """What the uses of one micro-batch sum to so far: to an earlier stage, at last to the sum."""
    name = _part_name(state, instruction)
    taken = state.take_gradients()
    if name in instruction.writes:
        rank.buffers[name] = taken
        return
    for key, view in state.views(rank.total(state)):
        if key in taken:
            view.add_(taken[key])


def _reduce(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    state.detach_gradients()
    (target,) = instruction.writes
    total = rank.total(state)
    if state.partitioned:
        reduced = total.new_empty(state.part_length)
        pending = rank.transport.reduce_scatter(total, reduced, _describe(instruction))
    else:
        reduced = total.clone()
        pending = rank.transport.all_reduce(reduced, _describe(instruction))
    rank.buffers[target] = reduced
    rank.buffers.pending(instruction, pending)


def _reduce_tied(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    state.detach_gradients()
    (source,), (target,) = instruction.reads, instruction.writes
    if source != target:
        rank.buffers[target] = rank.total(state).clone()
    pending = rank.transport.all_reduce_tied(
        rank.buffers[target], state.unit.ranks, _describe(instruction)
    )
    rank.buffers.pending(instruction, pending)


def _update(rank: RankState, instruction: Instruction) -> None:
    state = rank.unit(instruction)
    source = instruction.reads[0]
    gradient = rank.total(state) if source.startswith("sum:") else rank.buffers[source]
    if rank.observer is not None:
        rank.observer(state, gradient)
    state.detach_gradients()
    state.attach_piece_gradients(gradient)
    rank.optimizers[state.unit.name].step()


HANDLERS: dict[Opcode, Callable[[RankState, Instruction], None]] = {
    Opcode.LOAD: _load,
    Opcode.GATHER: _gather,
    Opcode.RELEASE: _release,
    Opcode.RECEIVE: _receive,
    Opcode.SEND: _send,
    Opcode.FORWARD: _forward,
    Opcode.RECOMPUTE: _recompute,
    Opcode.BACKWARD: _backward,
    Opcode.REDUCE: _reduce,
    Opcode.REDUCE_TIED: _reduce_tied,
    Opcode.UPDATE: _update,
}


def _stage_inputs(
    rank: RankState, instruction: Instruction
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Boundary tensors and batch of one micro-batch; random keys are set to it."""
    stage, micro_batch = rank.stage(instruction), instruction.micro_batch
    assert micro_batch is not None
    rank.random.begin(step=rank.step, replica=rank.replica, micro_batch=micro_batch)
    inputs = {
        name: with_traced_layout(rank.buffers[f"{name}.{micro_batch}"], rank.specs[name])
        for name in stage.plan.inputs
    }
    batch = {key: rank.buffers[f"batch:{key}.{micro_batch}"] for key in stage.plan.batch_keys}
    return inputs, batch


def _saved_tensor_hooks(rank: RankState) -> AbstractContextManager[object]:
    """Gathered weights may move between forward and backward; resident ones do not."""
    if not rank.plan.partition:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(rank.weights.pack, rank.weights.unpack)


def _saved_name(instruction: Instruction) -> str:
    return f"saved:{instruction.stage}.{instruction.micro_batch}"


def _tensor_of(buffer: str) -> str:
    """`h` of `h.3`, `gradient:h.3` or `batch:h.3`."""
    return buffer.rpartition(":")[2].rpartition(".")[0]


def _describe(instruction: Instruction) -> str:
    """The instruction in words, for errors."""
    words = [str(instruction.opcode)]
    if instruction.stage is not None:
        words.append(f"stage {instruction.stage}")
    if instruction.unit is not None:
        words.append(f"unit {instruction.unit}")
    if instruction.micro_batch is not None:
        words.append(f"micro-batch {instruction.micro_batch}")
    names = instruction.writes or instruction.reads
    return f"{' '.join(words)} ({', '.join(names)})"
