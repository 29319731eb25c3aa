"""Consistency of a plan in itself: every index and name in it refers to something it holds.

The checker, the simulator and the executor rely on it and look nothing up twice. This module does
not know the rules of the layered order: that is `planner.check`.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import astuple

from planner.errors import PlanFileError
from planner.graph import DTYPE_BYTES
from planner.partitions import LEVELS, updates_on_host
from planner.plan.code import references
from planner.plan.limits import limit_problems
from planner.plan.names import buffer_key, kind_of, stream_of
from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["validate_references"]

_COMPUTE = (
    Opcode.FORWARD, Opcode.RECOMPUTE,
    Opcode.BACKWARD, Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT,
)  # fmt: skip
_TRANSFER = (Opcode.SEND, Opcode.RECEIVE)
_OF_UNIT = (
    Opcode.GATHER, Opcode.REDUCE, Opcode.REDUCE_TIED, Opcode.UPDATE, Opcode.SAVE
)  # fmt: skip


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
    yield from limit_problems(plan)
    yield from _code_problems(plan)
    units = {unit.name for unit in plan.units}
    for name, programs in (("", plan.programs), ("evaluation ", plan.evaluation)):
        for rank, program in enumerate(programs):
            for index, instruction in enumerate(program):
                if problem := _instruction_problem(plan, units, rank, instruction):
                    yield f"{name}instruction {index} of pipeline rank {rank}: {problem}"


def _count_problems(plan: Plan) -> Iterator[str]:
    for name in (
        "num_replicas", "num_pipeline_ranks", "micro_batch_size", "num_micro_batches", "num_stages"
    ):  # fmt: skip
        if getattr(plan, name) < 1:
            yield f"{name} is {getattr(plan, name)}, less than 1"
    if plan.partition not in (LEVELS if plan.num_replicas > 1 else (0,)):
        yield f"partition is {plan.partition} with {plan.num_replicas} replicas"
    group, replicas = plan.partition_group_size, plan.num_replicas
    if group and not (plan.partition and 1 < group < replicas and replicas % group == 0):
        yield f"partition {plan.partition} in groups of {group} of {replicas} replicas"
    if plan.options.clip_delayed and (plan.options.clip_norm is None or plan.options.check_finite):
        yield "clip_delayed goes with clip_norm, and not with check_finite"
    if plan.options.update_on_host and not updates_on_host(
        plan.partition, offload_state=plan.offload_state
    ):
        yield "update_on_host goes with shards and moments in host memory"
    if plan.module_buffer_bytes < 0:
        yield "the model's buffers have a negative size"
    if len(plan.programs) != plan.num_pipeline_ranks:
        yield f"{len(plan.programs)} programs for {plan.num_pipeline_ranks} pipeline ranks"
    if plan.evaluation and len(plan.evaluation) != plan.num_pipeline_ranks:
        yield f"{len(plan.evaluation)} evaluation programs for {plan.num_pipeline_ranks} ranks"
    if len(plan.buffers) != plan.num_pipeline_ranks:
        yield f"{len(plan.buffers)} tables of buffers for {plan.num_pipeline_ranks} ranks"
    if plan.world_size > plan.cluster.num_devices:
        yield f"{plan.world_size} ranks on a cluster of {plan.cluster.num_devices} devices"
    if plan.prediction and len(plan.prediction.rank_limit_bytes) not in (
        0,
        plan.num_pipeline_ranks,
    ):
        yield f"{len(plan.prediction.rank_limit_bytes)} limits of {plan.num_pipeline_ranks} ranks"
    if plan.prediction and len(plan.prediction.peak_bytes) != plan.num_pipeline_ranks:
        yield f"{len(plan.prediction.peak_bytes)} peaks for {plan.num_pipeline_ranks} ranks"


def _cluster_problems(plan: Plan) -> Iterator[str]:
    hosts = plan.cluster.hosts
    links = (*(host.link for host in hosts), *(own.link for own in plan.cluster.host_links))
    for link in (plan.cluster.network, *links):
        if not (link.bandwidth > 0 and link.latency_seconds >= 0):
            yield f"link {link.name} has an impossible bandwidth or latency"
    for device in (host.device for host in hosts):
        if not (device.memory_bandwidth > 0 and device.memory_efficiency > 0):
            yield f"device {device.name} has no memory bandwidth"
        rates = [device.host_bandwidth] if device.host_bandwidth is not None else []
        if not (min(rates, default=1.0) > 0 and device.instruction_overhead_seconds >= 0):
            yield f"device {device.name} has an impossible host bandwidth or overhead"
        sizes = astuple(device.allocator) if device.allocator is not None else (1,)
        if min(sizes) < 1:
            yield f"device {device.name} has an allocator of impossible sizes"
    for host in hosts:
        if host.adapter_bandwidth is not None and not host.adapter_bandwidth > 0:
            yield "a host has adapters without bandwidth"
        if host.memory_bytes is not None and host.memory_bytes < 0:
            yield "a host has a negative amount of memory"
        if host.memory_bandwidth is not None and not host.memory_bandwidth > 0:
            yield "a host has memory without bandwidth"


def _buffer_problems(plan: Plan) -> Iterator[str]:
    """Buffers that a rank's table lacks, or whose name does not tell what they hold."""
    tensors, units = {tensor.name for tensor in plan.tensors}, {unit.name for unit in plan.units}
    known: dict[str, Container[str]] = {
        "": tensors | {"loss", "finite", "scale"},
        "gradient": tensors,
        "batch": {key.name for key in plan.batch},
        "saved": {str(stage.index) for stage in plan.stages},
        **dict.fromkeys(("part", "shard", "moments", "reduced", "square"), units),
        "clip": {"scale"},
    }
    for rank, table in enumerate(plan.buffers):
        for buffer in table:
            kind = kind_of(buffer.name.removeprefix("host:"))
            name = buffer.name.removeprefix("host:").removeprefix(f"{kind}:")
            if kind not in ("weights", "sum") and name not in known.get(kind, ()):
                yield f"buffer {buffer.name} names nothing that the plan holds"
            if buffer.dtype not in DTYPE_BYTES:
                yield f"buffer {buffer.name} has the unknown type {buffer.dtype!r}"
            if min(buffer.shape, default=0) < 0:
                yield f"buffer {buffer.name} has a negative size"
        keys = {buffer.name for buffer in table}
        if len(keys) != len(table):
            yield f"two buffers of pipeline rank {rank} have one name"
        for programs in (plan.programs, plan.evaluation):
            program = programs[rank] if rank < len(programs) else ()
            for name in {b for i in program for b in (*i.reads, *i.writes)}:
                if buffer_key(name) not in keys:
                    yield f"pipeline rank {rank} has no buffer {name}"


def _table_problems(plan: Plan) -> Iterator[str]:
    ranks, tensors = range(plan.num_pipeline_ranks), {tensor.name for tensor in plan.tensors}
    keys, parameters = {b.name for b in plan.batch}, {p.name for p in plan.parameters}
    units, stages = {unit.name for unit in plan.units}, range(plan.num_stages)
    for specs in (plan.batch, plan.tensors, plan.parameters, plan.units):
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            yield f"two of {names[:4]}... have one name"
        for spec in specs:
            for dtype in (spec.dtype, getattr(spec, "compute_dtype", "") or spec.dtype):
                if dtype not in DTYPE_BYTES:
                    yield f"{spec.name} has the unknown type {dtype!r}"
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
        lists = (stage.inputs, stage.outputs, stage.batch_keys, stage.units, stage.kept)
        if any(len(set(names)) < len(names) for names in lists):
            yield f"{what} names a tensor, batch key or unit twice"
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
        if not 0 <= (stage.recompute_seconds or 0.0) < 1e9:
            yield f"{what} has an impossible duration of its recompute"
        if not 0 <= stage.backward_weight_seconds <= stage.backward_seconds:
            yield f"{what} has a backward of weights that takes longer than its backward"
    for unit in plan.units:
        what = f"unit {unit.name}"
        if min(unit.num_elements, unit.update_transient_bytes) < 0 or not (
            unit.stages and unit.ranks
        ):
            yield f"{what} has no stage, no rank or a negative size"
        for listed in (unit.parameters, unit.stages, unit.ranks):
            if len(set(listed)) < len(listed):
                yield f"{what} names a parameter, stage or rank twice"
        yield from _missing(what, "pipeline rank", unit.ranks, ranks)
        yield from _missing(what, "stage", unit.stages, stages)
        yield from _missing(what, "parameter", unit.parameters, parameters)


def _code_problems(plan: Plan) -> Iterator[str]:
    """Batch keys of another size, and code that names values it does not have.

    Plans that are only simulated have no code at all.
    """
    for key in plan.batch:
        if key.shape[:1] != (plan.micro_batch_size,):
            yield f"batch key {key.name} has not {plan.micro_batch_size} samples in a micro-batch"
    for stage in plan.stages if any(stage.code for stage in plan.stages) else ():
        what, values = f"the code of stage {stage.index}", set(stage.inputs)
        for statement in stage.code:
            keys = statement.arguments[:1] if statement.function == "batch" else ()
            yield from _missing(what, "batch key", keys, stage.batch_keys)
            yield from _missing(what, "value", references(statement), values)
            if statement.target in values:
                yield f"{what} makes {statement.target} twice"
            values.add(statement.target)
        yield from _missing(what, "output", stage.outputs, values)


def _instruction_problem(
    plan: Plan, units: Container[str], rank: int, instruction: Instruction
) -> str:
    """What is wrong with one instruction, if anything; called for each, so plain."""
    opcode, stage, micro_batch = instruction.opcode, instruction.stage, instruction.micro_batch
    unit, peer, found = instruction.unit, instruction.peer, ""
    needs_stage = opcode in _COMPUTE
    if needs_stage if stage is None else not 0 <= stage < len(plan.stages):
        found = f"refers to stage {stage!r}, which the plan does not hold"
    elif (
        needs_stage or opcode is Opcode.LOAD
        if micro_batch is None
        else not 0 <= micro_batch < plan.num_micro_batches
    ):
        found = f"refers to micro-batch {micro_batch!r}, which the plan does not hold"
    elif opcode in _OF_UNIT if unit is None else unit not in units:
        found = f"refers to unit {unit!r}, which the plan does not hold"
    elif opcode in _TRANSFER:
        found = _transfer_problem(plan, rank, instruction)
    wanted = stream_of(opcode, peer, on_host=plan.options.update_on_host)
    if not found and instruction.stream != wanted:
        found = f"is on stream {instruction.stream}, but belongs on {wanted}"
    return f"{opcode.value} {found}" if found else ""


def _transfer_problem(plan: Plan, rank: int, instruction: Instruction) -> str:
    peer, reads, writes = instruction.peer, instruction.reads, instruction.writes
    if peer is None or not 0 <= peer < plan.num_pipeline_ranks or peer == rank:
        return f"refers to peer {peer!r}, which the plan does not hold"
    buffers = reads if instruction.opcode is Opcode.SEND else writes
    if len(reads) + len(writes) != 1 or len(buffers) != 1:
        return f"moves {(*reads, *writes)}, not one buffer"
    if kind_of(buffers[0]) not in ("", "gradient") or buffers[0].startswith("loss."):
        return f"moves {buffers[0]}, which is no tensor between stages"
    return ""


def _missing(
    what: str, kind: str, names: Iterable[object], known: Container[object]
) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{what} refers to {kind} {name!r}, which the plan does not hold"
