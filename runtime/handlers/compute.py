"""FORWARD, RECOMPUTE, BACKWARD and its halves, on the user's own modules.

What is the same in every step is looked up when the instruction is made ready.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from planner.plan.names import buffer_key
from planner.plan.types import Instruction, Opcode
from runtime.handlers.words import saved_name, tensor_of
from runtime.layout import empty, is_dense, with_traced_layout
from runtime.saved import SavedTensors
from runtime.shards import UnitState
from runtime.stage import Half, Saved
from runtime.state import RankState

__all__ = ["backward", "forward", "recompute"]

_HALVES = {Opcode.BACKWARD_INPUT: Half.INPUTS, Opcode.BACKWARD_WEIGHT: Half.WEIGHTS}


def forward(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    ready = _Forward(rank, instruction)
    if rank.program.is_evaluation:
        return ready.evaluate
    return ready.pass_by if ready.stage.plan.recompute else ready.save


def recompute(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    return _Forward(rank, instruction).save_again


def backward(rank: RankState, instruction: Instruction) -> Callable[[], None]:
    return _Backward(rank, instruction).run


class _Compute:
    """One micro-batch through one stage, either way."""

    def __init__(self, rank: RankState, instruction: Instruction) -> None:
        assert instruction.micro_batch is not None
        self.rank, self.instruction = rank, instruction
        self.stage = rank.stage(instruction)
        self.micro_batch = instruction.micro_batch
        self.saved_name = saved_name(instruction)
        self._pools = [name for name in instruction.reads if name in rank.weights.tensors]

    def begin(self) -> None:
        """Weights and random keys are set to this stage and micro-batch."""
        rank = self.rank
        if self._pools:
            rank.weights.use(self._pools)
        if self.stage.is_random:
            rank.random.begin(step=rank.step, replica=rank.replica, micro_batch=self.micro_batch)


class _Forward(_Compute):
    """A FORWARD or RECOMPUTE, ready to run."""

    def __init__(self, rank: RankState, instruction: Instruction) -> None:
        super().__init__(rank, instruction)
        plan = self.stage.plan
        self._inputs = [(name, self._buffer(name), rank.specs[name]) for name in plan.inputs]
        self._are_dense = all(is_dense(spec.shape, spec.stride) for _, _, spec in self._inputs)
        self._batch = [(key, self._buffer(key)) for key in plan.batch_keys]
        self._outputs = {name: self._buffer(name) for name in plan.outputs}
        kept = [] if plan.recompute else [self._buffer(name) for name in plan.kept]
        self._evicted = [name for name in kept if buffer_key(name) in rank.program.evicted]
        """Buffers that the stage's backward reads, and that leave the device before."""
        self._saved_leaves = buffer_key(self.saved_name) in rank.program.evicted
        leaves = self._saved_leaves or bool(self._evicted)
        self._stays = not leaves and not rank.plan.gathers
        """Whether all that backward needs is where it was when it is needed."""

    def save(self) -> None:
        """With what backward needs."""
        inputs, batch = self._take()
        if self._stays:
            outputs, saved = self.stage.forward_saving(inputs, batch)
            self.rank.buffers[self.saved_name] = saved
            self._hand_on(outputs)
            return
        moving = self._moving()
        with self._hooks(moving):
            outputs, saved = self.stage.forward_saving(inputs, batch)
        self.rank.buffers[self.saved_name] = saved
        self._hand_on(outputs)
        if moving is not None:
            self._hand_over(saved, moving)

    def save_again(self) -> None:
        """Only what backward needs."""
        inputs, batch = self._take()
        moving = self._moving()
        with self._hooks(moving):
            saved = self.stage.recompute(inputs, batch, self.micro_batch)
        self.rank.buffers[self.saved_name] = saved
        if moving is not None:
            self._hand_over(saved, moving)

    def pass_by(self) -> None:
        """With what a RECOMPUTE needs."""
        inputs, batch = self._take()
        self._hand_on(self.stage.forward(inputs, batch, self.micro_batch))

    def evaluate(self) -> None:
        inputs, batch = self._take()
        self._hand_on(self.stage.evaluate(inputs, batch))

    def _take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Boundary tensors and batch."""
        self.begin()
        buffers = self.rank.buffers
        inputs = {name: buffers[buffer] for name, buffer, _ in self._inputs}
        if not self._are_dense:
            for name, _, spec in self._inputs:
                inputs[name] = with_traced_layout(inputs[name], spec)
        return inputs, {key: buffers[buffer] for key, buffer in self._batch}

    def _hand_on(self, outputs: dict[str, Tensor]) -> None:
        rank = self.rank
        for name, value in outputs.items():
            rank.buffers[self._outputs[name]] = rank.weights.apart(value)
        if "loss" in outputs:
            rank.losses[self.micro_batch] = outputs["loss"]

    def _hooks(self, moving: SavedTensors | None) -> AbstractContextManager[object]:
        """Gathered weights may move between forward and backward, and what the plan evicts."""
        if self._stays:
            return nullcontext()
        holder = moving or self.rank.weights
        return torch.autograd.graph.saved_tensors_hooks(holder.pack, holder.unpack)

    def _moving(self) -> SavedTensors | None:
        """Where the plan evicts what the stage saves, or boundary tensors that backward reads."""
        if not self._saved_leaves and not self._evicted:
            return None
        return SavedTensors(self.rank.weights, self.rank.buffers.__getitem__)

    def _hand_over(self, saved: Saved, moving: SavedTensors) -> None:
        """Each saved tensor to the buffer that it leaves the device with."""
        for name in self._evicted:
            moving.give_to(name, self.rank.buffers[name])
        if self._saved_leaves:
            moving.keep(self._others())
            saved.tensors = moving
        moving.end_forward()

    def _others(self) -> list[Tensor]:
        """What a stage reads and makes: it stays when what the stage saves leaves the device."""
        rank, plan = self.rank, self.stage.plan
        names = {*plan.inputs, *plan.batch_keys}
        if self.instruction.opcode is Opcode.FORWARD:
            names |= set(plan.outputs)
        found = [rank.buffers[self._buffer(name)] for name in names]
        found += [p for name in plan.units for p in rank.units[name].parameters.values()]
        return [*found, *self.stage.module_buffers()]

    def _buffer(self, name: str) -> str:
        prefix = "batch:" if name in self.stage.plan.batch_keys else ""
        return f"{prefix}{name}.{self.micro_batch}"


class _Backward(_Compute):
    """A BACKWARD or one of its halves, ready to run."""

    def __init__(self, rank: RankState, instruction: Instruction) -> None:
        super().__init__(rank, instruction)
        self._half = _HALVES.get(instruction.opcode)
        units: list[UnitState] = []
        if self._half is not Half.INPUTS:
            units = [rank.units[name] for name in self.stage.plan.units]
        self._units = [state for state in units if state.unit.trainable]
        self._exact = [state for state in self._units if state.unit.exact]
        sums = [state for state in self._units if rank.sum_of(state) in instruction.writes]
        starting = [state for state in sums if rank.sum_of(state) not in instruction.reads]
        self._starting = [rank.total(state) for state in starting]
        """Sums that start anew."""
        self._targets = [
            pair
            for state in starting
            if not state.unit.exact
            for pair in rank.sums.targets(state, rank.sum_of(state))
        ]
        """Parameters, and where their gradients are added up from now on."""
        self._parameters = [s.parameters[name] for s in self._units for name in s.trainable]
        self._gradients = _gradients(instruction.reads)
        self._found = _gradients(instruction.writes)
        self._ends_loss = "loss" in self.stage.plan.outputs

    def run(self) -> None:
        self.begin()
        rank, buffers = self.rank, self.rank.buffers
        for total in self._starting:
            total.zero_()
        for parameter, view in self._targets:
            parameter.grad = view
        found = self.stage.backward(
            buffers[self.saved_name],
            self._gradients_of_outputs(),
            self._parts() if self._exact else (),
            half=self._half,
            parameters=self._parameters,
        )
        for state in self._exact:
            self._hand_on_part(state)
        for name, tensor in self._found:
            gradient = found.get(tensor)
            if gradient is None:  # the stage reads it, but no path of the loss goes through
                gradient = empty(rank.specs[tensor], rank.device).zero_()
            buffers[name] = gradient

    def _gradients_of_outputs(self) -> dict[str, Tensor]:
        """What later stages found, of outputs and of inputs that they read too."""
        rank = self.rank
        gradients: dict[str, Tensor] = {
            tensor: rank.buffers[name] for name, tensor in self._gradients
        }
        if self._ends_loss:
            gradients["loss"] = rank.gradient_of_loss(
                rank.losses[self.micro_batch], self.micro_batch
            )
        return gradients

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, what later stages found for it) of exact units."""
        return [
            (state.parameters[key], part)
            for state in self._exact
            if (name := self._part_name(state)) in self.instruction.reads
            for key, part in self.rank.buffers[name].items()
        ]

    def _hand_on_part(self, state: UnitState) -> None:
        """What the uses of one micro-batch sum to so far: to an earlier stage, at last to the
        sum."""
        name = self._part_name(state)
        taken = state.take_gradients()
        if name in self.instruction.writes:
            self.rank.buffers[name] = taken
            return
        for key, view in state.views(self.rank.total(state)):
            if key in taken:
                view.add_(taken[key])

    def _part_name(self, state: UnitState) -> str:
        return f"part:{state.unit.name}.{self.micro_batch}"


def _gradients(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(buffer, boundary tensor) of those that are gradients of boundary tensors."""
    return [(name, tensor_of(name)) for name in names if name.startswith("gradient:")]
