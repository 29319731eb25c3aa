"""FORWARD, RECOMPUTE, BACKWARD and its halves, on the user's own modules."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from planner.plan.names import buffer_key
from planner.plan.types import Instruction, Opcode, StagePlan
from runtime.handlers.words import saved_name, tensor_of
from runtime.layout import empty, with_traced_layout
from runtime.saved import SavedTensors
from runtime.shards import UnitState
from runtime.stage import Half, Saved
from runtime.state import RankState

__all__ = ["backward", "forward", "recompute"]

_HALVES = {Opcode.BACKWARD_INPUT: Half.INPUTS, Opcode.BACKWARD_WEIGHT: Half.WEIGHTS}


def forward(rank: RankState, instruction: Instruction) -> None:
    stage, micro_batch = rank.stage(instruction), instruction.micro_batch
    assert micro_batch is not None
    inputs, batch = _stage_inputs(rank, instruction)
    saved = moving = None
    if rank.program.is_evaluation:
        outputs = stage.evaluate(inputs, batch)
    elif stage.plan.recompute:
        outputs = stage.forward(inputs, batch, micro_batch)
    else:
        moving = _moving(rank, instruction)
        with _saved_tensor_hooks(rank, moving):
            outputs, saved = stage.forward_saving(inputs, batch)
        rank.buffers[saved_name(instruction)] = saved
    for name, value in outputs.items():
        rank.buffers[f"{name}.{micro_batch}"] = rank.weights.apart(value)
    if saved is not None and moving is not None:
        _hand_over(rank, instruction, saved, moving)
    if "loss" in outputs:
        rank.losses[micro_batch] = outputs["loss"]


def recompute(rank: RankState, instruction: Instruction) -> None:
    assert instruction.micro_batch is not None
    inputs, batch = _stage_inputs(rank, instruction)
    moving = _moving(rank, instruction)
    with _saved_tensor_hooks(rank, moving):
        saved = rank.stage(instruction).recompute(inputs, batch, instruction.micro_batch)
    rank.buffers[saved_name(instruction)] = saved
    if moving is not None:
        _hand_over(rank, instruction, saved, moving)


def backward(rank: RankState, instruction: Instruction) -> None:
    stage, half = rank.stage(instruction), _HALVES.get(instruction.opcode)
    rank.weights.use(instruction.reads)
    units: list[UnitState] = []
    if half is not Half.INPUTS:
        units = [rank.units[u] for u in stage.plan.units if rank.units[u].unit.trainable]
    for state in units:
        _prepare_gradients(rank, state, instruction)
    _set_keys(rank, instruction)
    found = stage.backward(
        rank.buffers[saved_name(instruction)],
        _gradients_of_outputs(rank, instruction),
        _parts(rank, units, instruction),
        half=half,
        parameters=[state.parameters[name] for state in units for name in state.trainable],
    )
    for state in units:
        if state.unit.exact:
            _hand_on_part(rank, state, instruction)
    for name in instruction.writes:
        if name.startswith("gradient:"):
            tensor = tensor_of(name)
            gradient = found.get(tensor)
            if gradient is None:  # the stage reads it, but no path of the loss goes through
                gradient = empty(rank.specs[tensor], rank.device).zero_()
            rank.buffers[name] = gradient


def _stage_inputs(
    rank: RankState, instruction: Instruction
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Boundary tensors and batch of one micro-batch; random keys and weights are set to it."""
    stage, micro_batch = rank.stage(instruction), instruction.micro_batch
    assert micro_batch is not None
    rank.weights.use(instruction.reads)
    _set_keys(rank, instruction)
    inputs = {
        name: with_traced_layout(rank.buffers[f"{name}.{micro_batch}"], rank.specs[name])
        for name in stage.plan.inputs
    }
    batch = {key: rank.buffers[f"batch:{key}.{micro_batch}"] for key in stage.plan.batch_keys}
    return inputs, batch


def _set_keys(rank: RankState, instruction: Instruction) -> None:
    assert instruction.micro_batch is not None
    rank.random.begin(step=rank.step, replica=rank.replica, micro_batch=instruction.micro_batch)


def _saved_tensor_hooks(
    rank: RankState, moving: SavedTensors | None
) -> AbstractContextManager[object]:
    """Gathered weights may move between forward and backward, and so may what the plan evicts."""
    if moving is None and not rank.plan.gathers:
        return nullcontext()
    holder = moving or rank.weights
    return torch.autograd.graph.saved_tensors_hooks(holder.pack, holder.unpack)


def _moving(rank: RankState, instruction: Instruction) -> SavedTensors | None:
    """Where the plan evicts what the stage saves, or boundary tensors that its backward reads."""
    saved = buffer_key(saved_name(instruction))
    if saved not in rank.program.evicted and not _evicted_tensors(rank, instruction):
        return None
    return SavedTensors(rank.weights, rank.buffers.__getitem__)


def _evicted_tensors(rank: RankState, instruction: Instruction) -> list[str]:
    """Buffers that the stage's backward reads, and that leave the device before."""
    stage = rank.stage(instruction).plan
    names = [] if stage.recompute else [_buffer(stage, name, instruction) for name in stage.kept]
    return [name for name in names if buffer_key(name) in rank.program.evicted]


def _buffer(stage: StagePlan, name: str, instruction: Instruction) -> str:
    prefix = "batch:" if name in stage.batch_keys else ""
    return f"{prefix}{name}.{instruction.micro_batch}"


def _hand_over(
    rank: RankState, instruction: Instruction, saved: Saved, moving: SavedTensors
) -> None:
    """Each saved tensor to the buffer that it leaves the device with."""
    for name in _evicted_tensors(rank, instruction):
        moving.give_to(name, rank.buffers[name])
    if buffer_key(saved_name(instruction)) in rank.program.evicted:
        moving.keep(_others(rank, instruction))
        saved.tensors = moving
    moving.end_forward()


def _others(rank: RankState, instruction: Instruction) -> list[Tensor]:
    """What a stage reads and makes: it stays when what the stage saves leaves the device."""
    stage = rank.stage(instruction)
    names = {*stage.plan.inputs, *stage.plan.batch_keys}
    if instruction.opcode is Opcode.FORWARD:
        names |= set(stage.plan.outputs)
    found = [rank.buffers[_buffer(stage.plan, name, instruction)] for name in names]
    found += [p for name in stage.plan.units for p in rank.units[name].parameters.values()]
    return [*found, *stage.module_buffers()]


def _gradients_of_outputs(rank: RankState, instruction: Instruction) -> dict[str, Tensor]:
    """What later stages found, of outputs and of inputs that they read too."""
    gradients = {
        tensor_of(name): rank.buffers[name]
        for name in instruction.reads
        if name.startswith("gradient:")
    }
    if "loss" in rank.stage(instruction).plan.outputs:
        assert instruction.micro_batch is not None
        loss = rank.losses[instruction.micro_batch]
        gradients["loss"] = torch.ones_like(loss) / rank.num_losses
    return gradients


def _prepare_gradients(rank: RankState, state: UnitState, instruction: Instruction) -> None:
    """Point the parameters at their accumulation buffer, and zero it where it starts anew."""
    name = rank.sum_of(state)
    if name not in instruction.writes:
        return
    total = rank.total(state)
    if name not in instruction.reads:
        total.zero_()
    if not state.unit.exact:
        state.attach_gradients(total)


def _parts(
    rank: RankState, units: list[UnitState], instruction: Instruction
) -> list[tuple[Tensor, Tensor]]:
    """(parameter, what later stages found for it) of exact units."""
    return [
        (state.parameters[key], part)
        for state in units
        if (name := _part_name(state, instruction)) in instruction.reads
        for key, part in rank.buffers[name].items()
    ]


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
