"""What the plan's tables ask of its instructions: operands of compute, and what buffers must hold.

This module knows stages, units and the table of buffers. It does not look at programs.
"""

import math
from dataclasses import dataclass

from planner.graph import TensorSpec
from planner.plan.flat import moment_elements
from planner.plan.names import kind_of
from planner.plan.types import Buffer, Opcode, Plan, StagePlan, Unit
from planner.schedules import Schedule

__all__ = ["BACKWARDS", "COMPUTE", "Expected", "Form"]

BACKWARDS = (Opcode.BACKWARD, Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT)
COMPUTE = (Opcode.FORWARD, Opcode.RECOMPUTE, *BACKWARDS)
_SCALARS = {"loss": "float32", "scale": "float32", "finite": "bool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The operands of a compute instruction of one stage; all but weights lack their `.<m>`."""

    reads: tuple[str, ...]
    """Buffers that hold what their name says, or nothing."""
    gradients: tuple[tuple[str, int], ...] = ()
    """Gradients and parts that it reads, and the stage that must have added to each last."""
    weights: tuple[str, ...] = ()
    """Weights in place that it reads; none where they are gathered into pools."""
    units: tuple[str, ...]
    """Whose weights it needs."""
    writes: tuple[str, ...]
    """Buffers that then hold what their name says."""
    made: tuple[str, ...] = ()
    """Gradients and parts that it writes."""
    sums: tuple[Unit, ...] = ()
    """Units to whose sums it adds, in the order in which it writes these."""


class Expected:
    """Look-ups in one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.units = {unit.name: unit for unit in plan.units}
        self.tensors = {tensor.name: tensor for tensor in plan.tensors}
        self.readers: dict[str, list[int]] = {name: [] for name in self.tensors}
        """Stages that read a tensor, ascending."""
        self.makers: dict[str, list[int]] = {name: [] for name in self.tensors}
        for stage in plan.stages:
            for name in stage.inputs:
                self.readers.setdefault(name, []).append(stage.index)
            for name in stage.outputs:
                self.makers.setdefault(name, []).append(stage.index)
        self.tables = [{buffer.name: buffer for buffer in table} for table in plan.buffers]
        self.unfit = [self._unfit(table) for table in self.tables]
        """Per rank: entries that cannot hold what belongs in them, with the reason."""
        self._forms: dict[tuple[int, Opcode], Form] = {}
        self._fitting: set[tuple[int, str, str]] = set()

    def form(self, stage: int, opcode: Opcode) -> Form:
        """The operands of a stage's FORWARD, RECOMPUTE, BACKWARD or one of its halves."""
        form = self._forms.get((stage, opcode))
        if form is None:
            make = self._backward if opcode in BACKWARDS else self._forward
            form = self._forms[stage, opcode] = make(self.plan.stages[stage], opcode)
        return form

    def fits(self, rank: int, buffer: str, unit: Unit) -> bool:
        """Whether a pool buffer can take the whole unit."""
        if (rank, buffer, unit.name) in self._fitting:
            return True
        if buffer not in self.tables[rank]:
            return False
        dtype = _dtype(kind_of(buffer), unit)
        if _lack(self.tables[rank][buffer], dtype, self.whole_elements(unit)):
            return False
        self._fitting.add((rank, buffer, unit.name))
        return True

    def part_elements(self, unit: Unit) -> int:
        """Elements of one replica's part of a unit: all of it where nothing is partitioned."""
        return -(-unit.num_elements // self.plan.num_parts)

    def reduced_elements(self, unit: Unit) -> int:
        """Elements of a unit's gradient on one replica, reduced over all of them."""
        divided = self.plan.divides_gradients
        return self.part_elements(unit) if divided else self.whole_elements(unit)

    def _moment_elements(self, unit: Unit) -> int:
        sizes = {p.name: p.num_elements for p in self.plan.parameters if p.trainable}
        trained = (sizes.get(name, 0) for name in unit.parameters)
        return moment_elements(trained, self.part_elements(unit))

    def whole_elements(self, unit: Unit) -> int:
        """Elements of all parts, padding included."""
        return self.part_elements(unit) * self.plan.num_parts

    def _forward(self, stage: StagePlan, opcode: Opcode) -> Form:
        reads = (*stage.inputs, *(f"batch:{key}" for key in stage.batch_keys))
        writes: tuple[str, ...] = (f"saved:{stage.index}",)
        if opcode is Opcode.FORWARD:
            keeps = not stage.recompute and self.plan.schedule is not Schedule.FORWARD
            writes = (*stage.outputs, *writes) if keeps else stage.outputs
        return Form(reads=reads, weights=self._in_place(stage), units=stage.units, writes=writes)

    def _backward(self, stage: StagePlan, opcode: Opcode) -> Form:
        reads = [f"saved:{stage.index}"]
        made_again = stage.outputs if stage.recompute else ()
        reads += [
            f"batch:{name}" if name in stage.batch_keys else name
            for name in stage.kept
            if name not in made_again
        ]
        gradients: list[tuple[str, int]] = []
        made: list[str] = []
        for name in (*stage.outputs, *stage.inputs):
            is_input = name in stage.inputs
            if name not in self.tensors or not self.tensors[name].requires_grad:
                continue
            if is_input and opcode is Opcode.BACKWARD_WEIGHT:
                continue
            later = [reader for reader in self.readers[name] if reader > stage.index]
            if later:
                gradients.append((f"gradient:{name}", later[0]))
            if is_input:
                made.append(f"gradient:{name}")
        sums: list[Unit] = []
        if opcode is not Opcode.BACKWARD_INPUT:
            for unit in (self.units[name] for name in stage.units):
                self._add_unit(stage.index, unit, gradients, made, sums)
        return Form(
            reads=tuple(dict.fromkeys(reads)),
            gradients=tuple(gradients),
            weights=self._in_place(stage),
            units=stage.units,
            writes=(),
            made=tuple(made),
            sums=tuple(sums),
        )

    @staticmethod
    def _add_unit(
        stage: int, unit: Unit, gradients: list[tuple[str, int]], made: list[str], sums: list[Unit]
    ) -> None:
        """Where the gradient of a unit goes: into its sum, or for exact units part by part."""
        if not unit.trainable:
            return
        later = [user for user in unit.stages if user > stage]
        if unit.exact and later:
            gradients.append((f"part:{unit.name}", later[0]))
        if unit.exact and stage != unit.stages[0]:
            made.append(f"part:{unit.name}")
        else:
            sums.append(unit)

    def _in_place(self, stage: StagePlan) -> tuple[str, ...]:
        return () if self.plan.gathers else tuple(f"weights:{name}" for name in stage.units)

    def _unfit(self, table: dict[str, Buffer]) -> dict[str, str]:
        found = {}
        for name, buffer in table.items():
            kind, _, subject = name.removeprefix("host:").rpartition(":")
            lack = self._lack(buffer, kind, subject)
            if lack:
                found[name] = f"{name} is {buffer.dtype} {list(buffer.shape)}, but holds {lack}"
        return found

    def _lack(self, buffer: Buffer, kind: str, subject: str) -> str:
        """What a buffer of the table must hold and cannot; nothing of pools."""
        if kind in ("", "gradient", "batch"):
            if not kind and subject in _SCALARS:
                return _lack(buffer, _SCALARS[subject], 1)
            specs: dict[str, TensorSpec] = self.tensors
            if kind == "batch":
                specs = {key.name: key for key in self.plan.batch}
            spec = specs[subject]
            same = (buffer.dtype, buffer.shape) == (spec.dtype, spec.shape)
            return "" if same else f"{spec.dtype} {list(spec.shape)}"
        if kind == "saved":
            return _lack(buffer, "uint8", self.plan.stages[int(subject)].saved_bytes)
        if kind == "clip":
            return _lack(buffer, "float32", 1)
        if kind == "square":
            return _lack(buffer, "float64", 1)
        unit = self.units.get(subject)
        if unit is None or kind == "sum" or (kind == "weights" and self.plan.gathers):
            return ""
        sizes = {
            "weights": self.whole_elements(unit),
            "part": unit.num_elements,
            "reduced": self.reduced_elements(unit),
            "moments": self._moment_elements(unit) * self.plan.options.optimizer_slots,
        }
        num_elements = sizes.get(kind, self.part_elements(unit))
        dtype = _dtype(kind, unit)
        same = (buffer.dtype, math.prod(buffer.shape)) == (dtype, num_elements)
        return "" if same else f"{num_elements} of {dtype}"


def _dtype(kind: str, unit: Unit) -> str:
    """Of a unit's buffers of a kind: those that stages compute with, and the others."""
    return unit.weights_dtype if kind in ("weights", "part") else unit.dtype


def _lack(buffer: Buffer, dtype: str, num_elements: int) -> str:
    enough = buffer.dtype == dtype and math.prod(buffer.shape) >= num_elements
    return "" if enough else f"{num_elements} of {dtype}"
