"""What the oracle looks up in a plan, and what it says.

It knows names, sizes and lives of buffers. It does not know what instructions do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.plan.types import Buffer, Opcode, Plan, StagePlan, Unit
from planner.schedules import Schedule

__all__ = ["BACKWARDS", "COMPUTE", "RESIDENT", "Facts", "Fault", "Life", "OracleResult", "kind_of"]

BACKWARDS = (Opcode.BACKWARD, Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT)
COMPUTE = (Opcode.FORWARD, Opcode.RECOMPUTE, *BACKWARDS)
RESIDENT = ("shard", "moments", "weights", "sum", "clip")
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with a plan."""

    kind: str
    """`signature`, `shape`, `count`, `order`, `hang`, `race` (a buffer does not hold what its
    reader needs), `transfer`, `gradient`, `end` (of the step) or `memory`."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleResult:
    """The oracle's verdict."""

    faults: tuple[Fault, ...]
    peak_bytes: tuple[int, ...] = ()
    """Per pipeline rank, the most over all explored states; empty if operands are malformed."""
    num_states: int = 0
    complete: bool = True
    """Whether every interleaving was explored; otherwise the rest was sampled by random walks."""

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.faults}


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A buffer's memory from the issue of its first writer to the end of its last use."""

    buffer: str
    num_bytes: int
    first: int
    uses: int
    """Bit i: instruction i uses it."""


def kind_of(buffer: str) -> str:
    """`saved` of `saved:3.1`; empty for boundary tensors, loss, finite and scale."""
    return buffer.split(":")[0] if ":" in buffer else ""


def num_bytes(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * _ITEM_BYTES.get(buffer.dtype, 1)


class Facts:
    """Look-ups in one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.units = {unit.name: unit for unit in plan.units}
        self.tensors = {tensor.name: tensor for tensor in plan.tensors}
        self.batch = {key.name: key for key in plan.batch}
        self.tables = [{b.name: b for b in table} for table in plan.buffers]
        self.trains = plan.schedule is not Schedule.FORWARD

    def later_readers(self, tensor: str, stage: int) -> tuple[int, ...]:
        """Stages behind `stage` that read a tensor, in the order in which they run backward."""
        stages = [s.index for s in self.plan.stages if tensor in s.inputs and s.index > stage]
        return tuple(reversed(stages))

    def chain(self, tensor: str) -> list[int]:
        """The stages that make or read a tensor."""
        return [s.index for s in self.plan.stages if tensor in (*s.inputs, *s.outputs)]

    def units_of(self, stage: StagePlan) -> list[Unit]:
        return [self.units[name] for name in stage.units]

    def trainable_on(self, rank: int) -> list[Unit]:
        return [u for u in self.plan.units if u.trainable and rank in u.ranks]

    def is_reduced(self, unit: Unit) -> bool:
        """Whether UPDATE reads `reduced:` rather than the sum itself."""
        return self.plan.num_replicas > 1 or len(unit.ranks) > 1

    @property
    def joins_updates(self) -> bool:
        """Whether weights are whole everywhere, and each replica updates a part of them."""
        return self.plan.partition in (1, 2)

    @property
    def away(self) -> list[str]:
        """Kinds of state that live on the host between their uses."""
        kinds = ["moments"] if self.joins_updates else ["shard", "moments"]
        return kinds if self.plan.offload_state else []

    @property
    def _share(self) -> int:
        """Of how many replicas each has one part of the state."""
        plan = self.plan
        if plan.partition == 0:
            return 1
        return plan.partition_group_size if plan.partition_group_size else plan.num_replicas

    def part_elements(self, unit: Unit) -> int:
        """Of one replica's shard."""
        return math.ceil(unit.num_elements / self._share)

    def whole_elements(self, unit: Unit) -> int:
        """Of the gathered unit with its padding."""
        return self.part_elements(unit) * self._share

    def reduced_elements(self, unit: Unit) -> int:
        """Of the gradient that a replica has after REDUCE."""
        scattered = self.plan.partition in (2, 3)
        return self.part_elements(unit) if scattered else self.whole_elements(unit)

    def entry(self, rank: int, buffer: str) -> Buffer | None:
        """A buffer's entry in the rank's table."""
        bare = buffer.removeprefix("host:")
        per_micro_batch = kind_of(bare) in ("", "gradient", "batch", "saved", "part")
        if per_micro_batch and bare not in ("finite", "scale"):
            buffer = buffer.rpartition(".")[0]
        return self.tables[rank].get(buffer)

    def is_resident(self, buffer: str) -> bool:
        """Whether its memory is taken for the whole step."""
        kind = kind_of(buffer)
        return kind in RESIDENT and kind not in self.away

    def resident_bytes(self, rank: int) -> int:
        """State and pools. Weights in place are the shard unless it is their master; only what is
        updated has moments."""
        updated = {i.unit for i in self.plan.programs[rank] if i.opcode is Opcode.UPDATE}
        total = 0
        for buffer in filter(
            lambda entry: self.is_resident(entry.name), self.tables[rank].values()
        ):
            kind, _, unit = buffer.name.partition(":")
            is_copy = kind == "shard" and not self.plan.gathers
            is_copy = is_copy and not self.units[unit].compute_dtype
            is_unused = kind == "moments" and self.trains and unit not in updated
            total += 0 if is_copy or is_unused else num_bytes(buffer)
        return total + self.plan.module_buffer_bytes

    def lives(self, rank: int) -> list[Life]:
        """Of all buffers that come and go; a RELEASE ends a life and a FETCH begins another."""
        found: list[tuple[str, list[int]]] = []
        current: dict[str, list[int]] = {}
        for index, instruction in enumerate(self.plan.programs[rank]):
            for buffer in dict.fromkeys((*instruction.writes, *instruction.reads)):
                if kind_of(buffer) == "host" or self.is_resident(buffer):
                    continue
                if buffer not in current or instruction.opcode is Opcode.FETCH:
                    current[buffer] = []
                    found.append((buffer, current[buffer]))
                current[buffer].append(index)
                if instruction.opcode is Opcode.RELEASE:
                    del current[buffer]
        lives = [
            Life(
                buffer=buffer,
                num_bytes=num_bytes(self._entry(rank, buffer)),
                first=uses[0],
                uses=sum(1 << index for index in uses),
            )
            for buffer, uses in found
        ]
        return lives + list(self._staging(rank))

    def _staging(self, rank: int) -> Iterator[Life]:
        """Sums between processes that exchange messages: one version of the gradient, or of this
        replica's part of it, arrives from each of the others."""
        for index, instruction in enumerate(self.plan.programs[rank]):
            if instruction.opcode not in (Opcode.REDUCE, Opcode.REDUCE_TIED):
                continue
            if self.plan.cluster.backend != "gloo" or instruction.unit is None:
                continue
            num_others = len(self.units[instruction.unit].ranks) - 1
            size = num_bytes(self._entry(rank, f"reduced:{instruction.unit}"))
            if instruction.opcode is Opcode.REDUCE:
                num_others = self._share - 1
                if self.plan.partition < 2:  # what arrives is one part of the whole from each
                    size, num_others = size - size // self.plan.num_replicas, 1
            yield Life(
                buffer=f"staging:{instruction.unit}",
                num_bytes=num_others * size,
                first=index,
                uses=1 << index,
            )

    def transient_bytes(self, rank: int, index: int) -> int:
        """What a compute instruction takes while it runs, besides what it makes for others."""
        instruction = self.plan.programs[rank][index]
        if instruction.stream == "host":
            return 0
        if instruction.opcode is Opcode.UPDATE and instruction.unit is not None:
            return self.units[instruction.unit].update_transient_bytes
        if instruction.opcode not in COMPUTE or instruction.stage is None:
            return 0
        stage = self.plan.stages[instruction.stage]
        peaks = {
            Opcode.FORWARD: stage.forward_transient_bytes,
            Opcode.RECOMPUTE: stage.recompute_transient_bytes,
        }
        made = [life for life in self.lives(rank) if life.first == index]
        others = sum(life.num_bytes for life in made if kind_of(life.buffer) != "saved")
        return max(0, peaks.get(instruction.opcode, stage.backward_transient_bytes) - others)

    def _entry(self, rank: int, buffer: str) -> Buffer:
        entry = self.entry(rank, buffer)
        assert entry is not None, f"signatures have found every buffer in the table: {buffer}"
        return entry
