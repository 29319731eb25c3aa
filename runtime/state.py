"""Everything one rank holds while it runs a plan: parameters, buffers, stages, optimizers."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from planner.plan.types import Instruction, Opcode, Plan
from runtime.buffers import Buffers, Sends
from runtime.code import LossFunction
from runtime.optimize import BuildOptimizer, BuildScheduler, UnitOptimizer
from runtime.random import KeyedRandom
from runtime.shards import UnitState, WeightBuffers
from runtime.stage import Stage, modules_of
from runtime.transport import Transport

__all__ = ["GradientObserver", "RankState"]

GradientObserver = Callable[[UnitState, Tensor], None]
"""Called before each update with the unit and this rank's part of its whole gradient."""


class RankState:
    """The memory of one rank. The handlers work on it; nothing else does."""

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        transport: Transport,
        world_rank: int,
        loss_fn: LossFunction | None,
        build_optimizer: BuildOptimizer,
        build_scheduler: BuildScheduler | None,
        device: torch.device,
    ) -> None:
        self.plan, self.transport, self.device = plan, transport, device
        self.rank, self.replica = plan.coordinates(world_rank)
        self.program = plan.programs[self.rank]
        self.random = KeyedRandom(plan.options.seed)
        self.buffers, self.sends = Buffers(self.program), Sends()
        self.batch: Mapping[str, Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.step = 0
        self.observer: GradientObserver | None = None
        mine = [stage for stage in plan.stages if stage.rank == self.rank]
        names = {name for stage in mine for name in stage.units}
        self.units = {
            unit.name: UnitState(unit, plan, model, self.replica)
            for unit in plan.units
            if unit.name in names
        }
        self.optimizers = {
            name: UnitOptimizer(state, build_optimizer, build_scheduler)
            for name, state in self.units.items()
            if state.unit.trainable
        }
        self._forget_others(model)
        self.weights = WeightBuffers(self.units, _gathered_units(self.program))
        self.sum_of = self._sum_of_units()
        self.sums = self._make_sums()
        callers = Counter(key for stage in plan.stages for key in modules_of(stage, model))
        shared_modules = frozenset(key for key, number in callers.items() if number > 1)
        gradient_tensors = frozenset(t.name for t in plan.tensors if t.requires_grad)
        self.stages = {
            stage.index: Stage(
                stage, gradient_tensors, model, loss_fn, device, self.random, shared_modules
            )
            for stage in mine
        }
        self.specs = {spec.name: spec for spec in plan.tensors}
        self.num_losses = plan.num_micro_batches * plan.num_replicas

    def unit(self, instruction: Instruction) -> UnitState:
        assert instruction.unit is not None
        return self.units[instruction.unit]

    def stage(self, instruction: Instruction) -> Stage:
        assert instruction.stage is not None
        return self.stages[instruction.stage]

    def total(self, state: UnitState) -> Tensor:
        """The accumulated gradient of a unit: its length of its accumulation buffer."""
        return self.sums[self.sum_of[state.unit.name]][: state.padded_length]

    def resident_tensors(self) -> list[Tensor]:
        """What stays allocated between steps."""
        found = [state.shard for state in self.units.values()]
        found += [*self.weights.tensors.values(), *self.sums.values()]
        return found + [t for optimizer in self.optimizers.values() for t in optimizer.tensors()]

    def _forget_others(self, model: torch.nn.Module) -> None:
        """Parameters of other ranks hold no memory, nor do gathered ones until they are."""
        held = {id(p) for state in self.units.values() for p in state.parameters.values()}
        for parameter in model.parameters():
            if id(parameter) not in held:
                parameter.data = parameter.data.new_empty(0)
        if self.plan.partition:
            for state in self.units.values():
                state.detach_weights()

    def _sum_of_units(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for instruction in self.program:
            if instruction.opcode in (Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.UPDATE):
                source = instruction.reads[0]
                if instruction.unit and source.startswith("sum:"):
                    found.setdefault(instruction.unit, source)
        return found

    def _make_sums(self) -> dict[str, Tensor]:
        """One accumulation buffer per name, as long as the largest unit that uses it."""
        sums: dict[str, Tensor] = {}
        for unit, name in self.sum_of.items():
            state = self.units[unit]
            if name not in sums or sums[name].numel() < state.padded_length:
                sums[name] = state.shard.new_zeros(state.padded_length)
        return sums


def _gathered_units(program: tuple[Instruction, ...]) -> dict[str, set[str]]:
    """Gather buffer -> units that the program gathers into it."""
    found: dict[str, set[str]] = {}
    for instruction in program:
        if instruction.opcode is Opcode.GATHER and instruction.unit:
            (name,) = instruction.writes
            found.setdefault(name, set()).add(instruction.unit)
    return found
