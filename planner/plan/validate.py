"""Consistency of a plan in itself: every index and name in it refers to something it holds.

The checker, the simulator and the executor rely on it and look nothing up twice. This module does
not know the rules of the layered order: that is `planner.check`.
"""

from collections.abc import Container, Iterable, Iterator

from planner.errors import PlanFileError
from planner.graph import DTYPE_BYTES
from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["validate_references"]

_COMPUTE = (Opcode.FORWARD, Opcode.RECOMPUTE, Opcode.BACKWARD)
_TRANSFER = (Opcode.SEND, Opcode.RECEIVE)
_OF_UNIT = (Opcode.GATHER, Opcode.RELEASE, Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.UPDATE)


def validate_references(plan: Plan, *, source: str = "plan") -> None:
    """Refuse a plan that refers to something it does not hold.

    Raises:
        PlanFileError: names the first dangling reference; `source` is named with it.
    """
    for problem in _problems(plan):
        raise PlanFileError(f"{source}: {problem}", hint="make the plan again with lga-plan")


def _problems(plan: Plan) -> Iterator[str]:
    yield from _count_problems(plan)
    yield from _table_problems(plan)
    yield from _cluster_problems(plan)
    yield from _buffer_problems(plan)
    units = {unit.name for unit in plan.units}
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            for problem in _instruction_problems(plan, units, rank, instruction):
                yield f"instruction {index} of pipeline rank {rank}: {problem}"


def _count_problems(plan: Plan) -> Iterator[str]:
    for name in (
        "num_replicas", "num_pipeline_ranks", "micro_batch_size", "num_micro_batches", "num_stages"
    ):  # fmt: skip
        if getattr(plan, name) < 1:
            yield f"{name} is {getattr(plan, name)}, less than 1"
    if len(plan.programs) != plan.num_pipeline_ranks:
        yield f"{len(plan.programs)} programs for {plan.num_pipeline_ranks} pipeline ranks"
    if plan.world_size > plan.cluster.num_devices:
        yield f"{plan.world_size} ranks on a cluster of {plan.cluster.num_devices} devices"
    if plan.prediction and len(plan.prediction.peak_bytes) != plan.num_pipeline_ranks:
        yield f"{len(plan.prediction.peak_bytes)} peaks for {plan.num_pipeline_ranks} ranks"


def _cluster_problems(plan: Plan) -> Iterator[str]:
    hosts = plan.cluster.hosts
    for link in (plan.cluster.network, *(host.link for host in hosts)):
        if not (link.bandwidth > 0 and link.latency_seconds >= 0):
            yield f"link {link.name} has an impossible bandwidth or latency"
    for device in (host.device for host in hosts):
        if not (device.memory_bandwidth > 0 and device.memory_efficiency > 0):
            yield f"device {device.name} has no memory bandwidth"


def _buffer_problems(plan: Plan) -> Iterator[str]:
    """Buffers whose name does not tell what they hold."""
    tensors, units = {tensor.name for tensor in plan.tensors}, {unit.name for unit in plan.units}
    known: dict[str, Container[str]] = {
        "": tensors | {"loss"},
        "gradient": tensors,
        "batch": {key.name for key in plan.batch},
        "saved": {str(stage.index) for stage in plan.stages},
        "part": units,
        "shard": units,
        "reduced": units,
    }
    pools = ("weights", "sum")
    for program in plan.programs:
        for buffer in {b for i in program for b in (*i.reads, *i.writes)}:
            kind, _, rest = buffer.rpartition(":")
            name = rest if kind in ("shard", "reduced") else rest.rpartition(".")[0]
            if kind not in pools and name not in known.get(kind, ()):
                yield f"buffer {buffer} names nothing that the plan holds"


def _table_problems(plan: Plan) -> Iterator[str]:
    ranks, tensors = range(plan.num_pipeline_ranks), {tensor.name for tensor in plan.tensors}
    keys, parameters = {b.name for b in plan.batch}, {p.name for p in plan.parameters}
    units, stages = {unit.name for unit in plan.units}, range(plan.num_stages)
    for specs in (plan.batch, plan.tensors, plan.parameters, plan.units):
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            yield f"two of {names[:4]}... have one name"
        for spec in specs:
            if spec.dtype not in DTYPE_BYTES:
                yield f"{spec.name} has the unknown type {spec.dtype!r}"
            if min(getattr(spec, "shape", ()), default=0) < 0:
                yield f"{spec.name} has a negative size"
    for position, stage in enumerate(plan.stages):
        what = f"stage {position}"
        if stage.index != position:
            yield f"{what} has index {stage.index}"
        yield from _missing(what, "pipeline rank", [stage.rank], ranks)
        yield from _missing(what, "tensor", [*stage.inputs, *stage.outputs], {*tensors, "loss"})
        yield from _missing(what, "batch key", stage.batch_keys, keys)
        yield from _missing(what, "unit", stage.units, units)
        sizes = (
            stage.saved_bytes,
            stage.forward_transient_bytes,
            stage.recompute_transient_bytes,
            stage.backward_transient_bytes,
        )
        if min(sizes) < 0:
            yield f"{what} has a negative size"
        if not (0 <= stage.forward_seconds < 1e9 and 0 <= stage.backward_seconds < 1e9):
            yield f"{what} has an impossible duration"
    for unit in plan.units:
        what = f"unit {unit.name}"
        if unit.num_elements < 0 or not unit.stages or not unit.ranks:
            yield f"{what} has no stage, no rank or a negative size"
        yield from _missing(what, "pipeline rank", unit.ranks, ranks)
        yield from _missing(what, "stage", unit.stages, stages)
        yield from _missing(what, "parameter", unit.parameters, parameters)


def _instruction_problems(
    plan: Plan, units: set[str], rank: int, instruction: Instruction
) -> Iterator[str]:
    opcode, what = instruction.opcode, instruction.opcode.value
    if opcode in _COMPUTE or instruction.stage is not None:
        yield from _missing(what, "stage", [instruction.stage], range(plan.num_stages))
    if opcode in _COMPUTE or instruction.micro_batch is not None:
        micro_batches = range(plan.num_micro_batches)
        yield from _missing(what, "micro-batch", [instruction.micro_batch], micro_batches)
    if opcode in _OF_UNIT:
        yield from _missing(what, "unit", [instruction.unit], units)
        num_buffers = (len(instruction.reads), len(instruction.writes))
        if opcode is not Opcode.UPDATE and num_buffers != (1, int(opcode is not Opcode.RELEASE)):
            yield f"{what} reads {num_buffers[0]} buffers and writes {num_buffers[1]}"
    elif opcode in _TRANSFER:
        peers = set(range(plan.num_pipeline_ranks)) - {rank}
        yield from _missing(what, "peer", [instruction.peer], peers)
        buffers = instruction.reads if opcode is Opcode.SEND else instruction.writes
        if len(buffers) != 1:
            yield f"{what} names {len(buffers)} buffers instead of one"
        for buffer in buffers:
            if ":" in buffer.removeprefix("gradient:") or buffer.startswith("loss."):
                yield f"{what} moves {buffer}, which is no tensor between stages"
    elif opcode not in (*_COMPUTE, Opcode.LOAD):
        yield f"{what} is reserved for a later version"


def _missing(
    what: str, kind: str, names: Iterable[object], known: Container[object]
) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{what} refers to {kind} {name!r}, which the plan does not hold"
