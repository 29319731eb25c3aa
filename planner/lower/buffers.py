"""The table of a rank's buffers: what each buffer that its programs name can hold."""

from collections.abc import Iterable, Mapping, Sequence

from planner.graph import LayerGraph, TensorSpec
from planner.partitions import divides_gradients
from planner.plan.flat import moment_elements
from planner.plan.names import buffer_key
from planner.plan.types import Buffer, Instruction, PlanOptions, StagePlan, Unit
from planner.solve.types import Placement

__all__ = ["BufferTable"]


class BufferTable:
    """Makes the tables of all ranks of a plan."""

    def __init__(
        self,
        graph: LayerGraph,
        placement: Placement,
        options: PlanOptions,
        stages: Sequence[StagePlan],
        units: Iterable[Unit],
    ) -> None:
        self._units = {unit.name: unit for unit in units}
        self._specs: dict[str, TensorSpec] = {
            **graph.tensor_specs,
            **{spec.name: spec for spec in graph.batch},
        }
        self._trained = {p.name: p.num_elements for p in graph.parameters if p.trainable}
        self._placement, self._options, self._stages = placement, options, stages

    def of_rank(
        self, programs: Iterable[Iterable[Instruction]], pools: Mapping[str, Unit]
    ) -> tuple[Buffer, ...]:
        """Every buffer that a rank's `programs` name, sorted by name.

        `pools` is the largest unit that each buffer of a pool must have room for.
        """
        names: set[str] = set()
        for program in programs:
            for instruction in program:
                names.update(instruction.reads)
                names.update(instruction.writes)
        return tuple(self._buffer(key, pools) for key in sorted(set(map(buffer_key, names))))

    def _buffer(self, key: str, pools: Mapping[str, Unit]) -> Buffer:
        name = key.removeprefix("host:")
        kind, _, subject = name.rpartition(":")
        unit = pools.get(name) or self._units.get(subject)
        if kind == "saved":
            return Buffer(name=key, dtype="uint8", shape=(self._stages[int(subject)].saved_bytes,))
        if unit is not None and kind in _UNIT_KINDS:
            dtype = unit.weights_dtype if kind in ("weights", "part") else unit.dtype
            return Buffer(name=key, dtype=dtype, shape=self._unit_shape(kind, unit))
        if name in ("loss", "scale"):
            return Buffer(name=key, dtype="float32", shape=())
        if name == "clip:scale":
            return Buffer(name=key, dtype="float32", shape=())
        if kind == "square":
            return Buffer(name=key, dtype="float64", shape=())
        if name == "finite":
            return Buffer(name=key, dtype="bool", shape=())
        spec = self._specs[subject]
        return Buffer(name=key, dtype=spec.dtype, shape=spec.shape)

    def _unit_shape(self, kind: str, unit: Unit) -> tuple[int, ...]:
        """Whole units are padded to equal parts where replicas divide anything."""
        whole = part = unit.num_elements
        partition = self._placement.partition
        if partition:
            part = -(-whole // self._placement.num_parts)
            whole = part * self._placement.num_parts
        trained = (self._trained.get(name, 0) for name in unit.parameters)
        shapes = {
            "part": (unit.num_elements,),
            "shard": (part,),
            "reduced": (part if divides_gradients(partition) else whole,),
            "moments": (self._options.optimizer_slots, moment_elements(trained, part)),
        }
        return shapes.get(kind, (whole,))


_UNIT_KINDS = ("weights", "sum", "part", "shard", "reduced", "moments")
