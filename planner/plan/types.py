"""The Plan: the static instruction program of every pipeline rank, and all it refers to.

How a program runs (docs/decisions/0011). A rank issues its instructions in order. One is issued
when all before it have been issued, every compute instruction before it is over, and the
conflicting uses of its buffers before it are over (it waits for the last writer of what it reads,
and for the last writer and the readers since of what it writes). It runs when its predecessor in
its stream is over as well, beside whatever else is running. Nothing else orders anything.

Buffer names
    <tensor>.<m>            boundary tensor of micro-batch m (a stage's input or output)
    gradient:<tensor>.<m>   its gradient, on its way back
    batch:<key>.<m>         one key of the batch
    saved:<stage>.<m>       what forward keeps for backward
    loss.<m>                loss of micro-batch m
    shard:<unit>            this rank's own part of a unit's weights
    moments:<unit>          what the optimizer keeps for that part
    weights:<pool>.<i>      gather buffer i of a pool; `weights:<unit>` where weights stay in place,
                            and then the shard is a part of it, or all, but in mixed precision,
                            where the shard is the master and this is the copy to compute with
    sum:<pool>.<i>          gradient accumulation buffer i of a pool
    part:<unit>.<m>         gradient of a tied unit for one micro-batch (kept for exact order)
    reduced:<unit>          the gradient reduced over replicas, or this rank's part of it
    host:reduced:<unit>     the unit's whole gradient on its way to an update on the host
    finite, scale           verdict of CHECK_FINITE; factor that CLIP found
    square:<unit>           sum of the squares of the gradient that UPDATE used
    clip:scale              factor for the next step's gradients, where clipping is delayed
    host:<buffer>           the buffer's copy in host memory
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from planner.cluster.types import Cluster
from planner.graph import DTYPE_BYTES, ParameterSpec, TensorSpec
from planner.layouts import Grid, Layout
from planner.partitions import divides_gradients, gathers_for_passes, gathers_updates, offloaded
from planner.plan.code import Statement
from planner.precision import Precision
from planner.schedules import Schedule

__all__ = [
    "Buffer",
    "Instruction",
    "Opcode",
    "Plan",
    "PlanOptions",
    "Prediction",
    "StagePlan",
    "Unit",
]

FORMAT_VERSION = 3


class Opcode(StrEnum):
    """Every instruction, in pseudo-code. `need` is what its buffers must hold when it starts; an
    instruction reads and writes the buffers of its pseudo-code and no others.
    """

    LOAD = "LOAD"
    """copy.in. for each written batch:<key>.<m>:
        it = rows m*b .. (m+1)*b of the replica's batch"""
    FETCH = "FETCH"
    """copy.in. need host:<x> written
        <x> = host:<x>"""
    EVICT = "EVICT"
    """copy.out. need <x> written
        host:<x> = <x>; <x> itself stays until it is released
    Where updates run on the host: need the unit's whole gradient (sum:<pool>.<i> or reduced:<unit>)
        host:reduced:<unit> = the gradient, which is then spent unless CHECK_FINITE or CLIP read it
    """
    GATHER = "GATHER"
    """data, every replica. need shard:<unit> not updated yet
        weights:<pool>.<i> = shards of the replicas of its partition group, one after the other
    With partition 1 and 2 weights stay in place. There it needs shard:<unit> after its UPDATE:
        weights:<unit> = shards of the replicas of its partition group, one after the other
    In mixed precision each replica casts its shard to the compute type before it leaves."""
    RELEASE = "RELEASE"
    """compute. need weights:<pool>.<i> holds <unit>, or another <x> that may be evicted, written
        it holds nothing, and its memory may be taken
    As it writes what an EVICT reads, it waits for the copy: so memory that leaves is bounded."""
    RECEIVE = "RECEIVE"
    """from.<peer>, together with the peer's SEND that is as far down its stream.
        written buffer = what that SEND reads: the same name, shape and dtype"""
    SEND = "SEND"
    """to.<peer>, together with the peer's RECEIVE that is as far down its stream."""
    FORWARD = "FORWARD"
    """compute. need inputs, batch keys, and the weights of the stage's units
        outputs, saved = stage(inputs, batch; weights)
    Without a write of `saved` (recompute, evaluation) nothing is kept for backward."""
    RECOMPUTE = "RECOMPUTE"
    """compute. need what FORWARD needs
        saved = stage(inputs, batch; weights), with the random keys of the FORWARD"""
    BACKWARD = "BACKWARD"
    """compute. need saved, the stage's kept tensors (of outputs, RECOMPUTE has made its own),
    weights, and the gradient of each output and input that later stages have added to
        gradients of inputs = backward(saved, gradients of outputs) + what later stages added
        sum:<pool>.<i> of each trainable unit += its gradient; where it is not read, = its gradient
    For an exact unit: its part joins part:<unit>.<m> of later stages and is written to it, or at
    the unit's first stage to the sum."""
    BACKWARD_INPUT = "BACKWARD_INPUT"
    """compute. The first half of BACKWARD: gradients of inputs only."""
    BACKWARD_WEIGHT = "BACKWARD_WEIGHT"
    """compute. The second half: gradients of units only, from saved, kept tensors, weights and
    the gradients of the outputs, all as BACKWARD_INPUT found them."""
    REDUCE = "REDUCE"
    """data, every replica. need sum:<pool>.<i> of the unit
        reduced:<unit> (+)= my part of the sum over replicas of sum:<pool>.<i>
    With partition 0 and 1 my part is all of it. With 2 and 3 it is summed inside my partition group
    first, then over the groups, among the replicas that have the same part. It adds where it also
    reads reduced:<unit>. The sum is then spent."""
    REDUCE_TIED = "REDUCE_TIED"
    """data, every pipeline rank of the unit. need reduced:<unit>, or with one replica the sum
        reduced:<unit> = its sum over those ranks, equal on all of them"""
    CHECK_FINITE = "CHECK_FINITE"
    """data, every rank. need all gradients that UPDATE will read
        finite = whether every element of them is finite, on every rank"""
    CLIP = "CLIP"
    """data, every rank. need all gradients that UPDATE will read
        scale = min(1, clip_norm / their norm over the whole model), tied units counted once
    Where clipping is delayed: need square:<unit> of all units that the rank updates
        clip:scale = the same of the norm whose square they sum up to"""
    UPDATE = "UPDATE"
    """compute, or host. need the unit's whole gradient, shard and moments; finite and scale where
    made; where updates run on the host, all of these but the verdicts in their host: buffers
        if finite: shard, moments = optimizer(shard, moments, scale * gradient)
    Where clipping is delayed, scale is clip:scale, as the step before left it (1 at first), and
        square:<unit> = sum of the squares of the gradient's elements, before they are scaled
    and, where weights stay in place, weights:<unit> too, of which the shard is a part (in mixed
    precision: the copy of that part, cast): with partition 1 and 2 nothing may read them before
    their GATHER. The gradient is then spent."""
    SAVE = "SAVE"
    """copy.out. need shard:<unit> and moments:<unit> after their UPDATE
        host:shard:<unit>, host:moments:<unit> = they, as this step's checkpoint"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a program."""

    opcode: Opcode
    stream: str
    """`compute`, `data`, `copy.in`, `copy.out`, `host` (of updates there), or `to.<peer>` /
    `from.<peer>`: the pipeline's own streams, one per peer and direction, so that no transfer waits
    behind another pair's."""
    stage: int | None = None
    micro_batch: int | None = None
    unit: str | None = None
    peer: int | None = None
    """Pipeline rank at the other end (SEND, RECEIVE)."""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """A buffer that is both read and written (accumulation) stands in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """What a rank's buffer can hold. Buffers of a micro-batch share one entry, without `.<m>`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Pools: (elements of the largest unit they take, padded). `saved`: (bytes,) of uint8."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that are gathered, reduced and updated together: one flat vector.

    Each stage has one unit per dtype for the parameters it alone uses; parameters that several
    stages use (tied) have units of their own, on every rank that uses them.
    """

    name: str
    dtype: str
    """Of weights, gradients and moments."""
    parameters: tuple[str, ...]
    """In flat order."""
    num_elements: int
    """Length of the flat vector (`planner.plan.flat`), without what makes replicas' parts equal."""
    stages: tuple[int, ...]
    """Stages that use it, ascending."""
    ranks: tuple[int, ...]
    """Pipeline ranks that hold it, ascending; more than one for tied units only."""
    trainable: bool = True
    """False where no parameter of it is trained: it has no gradient, reduction or update."""
    exact: bool = False
    """Tied between stages of one rank: gradients are kept per micro-batch and added in the
    order in which plain accumulation adds them, so that the sum is bitwise equal."""
    update_transient_bytes: int = 0
    """Peak of UPDATE above weights, gradient and moments."""
    compute_dtype: str = ""
    """In mixed precision, of the copy of the weights that stages compute with; the shard is then
    the master of it, and no part of it. Empty: stages compute with the weights themselves."""

    @property
    def weights_dtype(self) -> str:
        """Of what stages compute with: `weights:` and `part:` buffers."""
        return self.compute_dtype or self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: where it runs and its code."""

    index: int
    rank: int
    layers: tuple[str, ...]
    recompute: bool
    code: tuple[Statement, ...]
    inputs: tuple[str, ...]
    """Boundary tensors it takes from earlier stages."""
    outputs: tuple[str, ...]
    """Boundary tensors it hands on: made here; `loss` for the last stage."""
    batch_keys: tuple[str, ...]
    units: tuple[str, ...]
    mutated_inputs: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Inputs, outputs and batch keys that backward reads besides what the stage saves."""
    forward_seconds: float = 0.0
    """Predicted for one micro-batch."""
    backward_seconds: float = 0.0
    """Predicted for one micro-batch, recompute not included."""
    recompute_seconds: float | None = None
    """Predicted for one micro-batch's RECOMPUTE, which sends nothing; None: as its forward."""
    backward_weight_seconds: float = 0.0
    """The part of it that BACKWARD_WEIGHT takes."""
    saved_bytes: int = 0
    """Kept from forward (or recompute) to backward for one micro-batch, less boundary tensors."""
    forward_transient_bytes: int = 0
    """Peak of FORWARD above what it saves; with recompute it saves nothing."""
    recompute_transient_bytes: int = 0
    """Peak of RECOMPUTE above what it saves."""
    backward_transient_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the executor needs beside the programs."""

    deadline_seconds: float = 300.0
    """Longest wait for any transfer or collective."""
    heartbeat_seconds: float = 10.0
    """A rank not heard of for so long counts as lost."""
    seed: int = 0
    """Of parameter initialisation, dropout keys and data order."""
    optimizer_slots: int = 2
    """Tensors per parameter that the optimizer keeps (AdamW: 2), for memory."""
    update_slots_of_each: float = 0.0
    """What the optimizer makes while it updates: tensors as large as the parameter that has its
    turn (AdamW: 2)."""
    update_slots_of_previous: float = 0.0
    """As large as the parameter that had its turn before (AdamW: 1)."""
    update_slots_of_all: float = 0.0
    """As large as all parameters of the unit together (AdamW with `foreach`: 1)."""
    check_finite: bool = False
    """Update nothing in a step with a gradient that is not finite."""
    clip_norm: float | None = None
    """Largest norm of the whole model's gradient; updates wait for it at the end of the step."""
    clip_delayed: bool = False
    """They do not: they scale by what the norm of the step before asks for, the first by 1."""
    save: bool = False
    """Leave a complete checkpoint in host memory after every step."""
    update_on_host: bool = False
    """The optimizer steps on the host, on a state that lives there with its shards; gradients go
    down to it, and no state comes up for an update."""
    precision: Precision = Precision.MODEL
    """Of compute: floating batches, buffers and copies of parameters are of its type. With float16
    the loss is scaled, and the scale follows the verdicts of CHECK_FINITE."""
    keep_float32: tuple[str, ...] = ()
    """Patterns of parameters and buffers whose modules compute in float32 all the same
    (`planner.compute_type`)."""

    @property
    def updates_wait(self) -> bool:
        """Whether updates stand at the end of the step, behind a verdict on all gradients."""
        return self.check_finite or (self.clip_norm is not None and not self.clip_delayed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the plan says the run will cost."""

    step_seconds: float
    bubble: float
    """Idle part of the compute streams over the step: 1 - busy / (ranks x step)."""
    peak_bytes: tuple[int, ...]
    """Per pipeline rank."""
    memory_limit_bytes: int
    """Of the rank with the least."""
    provenance: str
    bound_seconds: float | None = None
    """No plan of the space that was searched takes less; None where nothing was searched."""
    rank_limit_bytes: tuple[int, ...] = ()
    """Per pipeline rank; empty where all have the same."""

    def limit_of(self, rank: int) -> int:
        """Bytes that a pipeline rank may hold."""
        return self.rank_limit_bytes[rank] if self.rank_limit_bytes else self.memory_limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole training step for every rank."""

    model_name: str
    fingerprint: str
    cluster: Cluster
    """What it was planned for: enough to simulate the plan again."""
    num_replicas: int
    num_pipeline_ranks: int
    micro_batch_size: int
    num_micro_batches: int
    partition: int
    """What replicas divide among them, from 0 (nothing) to 3: see `planner.partitions`."""
    offload_state: bool
    """Shards and moments live in host memory, and come to the device when they are used; moments
    alone with partition 1 and 2."""
    schedule: Schedule
    layer_names: tuple[str, ...]
    """Every layer of the model, in order: rule 1 compares the stages with it."""
    batch: tuple[TensorSpec, ...]
    tensors: tuple[TensorSpec, ...]
    """Boundary tensors between stages."""
    parameters: tuple[ParameterSpec, ...]
    units: tuple[Unit, ...]
    stages: tuple[StagePlan, ...]
    num_random_operators: int
    options: PlanOptions
    prediction: Prediction | None
    programs: tuple[tuple[Instruction, ...], ...]
    """One per pipeline rank, in issue order; replicas share them."""
    evaluation: tuple[tuple[Instruction, ...], ...]
    """The same for a forward pass without backward; empty in a plan that is one itself."""
    buffers: tuple[tuple[Buffer, ...], ...]
    """Per pipeline rank: every buffer that its programs name."""
    module_buffer_bytes: int = 0
    """Of the model's own buffers (running statistics, tables), which every rank holds all of."""
    layout: Layout = Layout.REPLICAS_INSIDE
    """Which world ranks, and so which hosts, the replicas and pipeline ranks have."""
    partition_group_size: int = 0
    """Consecutive replicas that divide the state among them, as all other groups do; 0: all."""

    @property
    def num_parts(self) -> int:
        """Of the state, one for each replica of a partition group; 1 where it is whole."""
        return self.grid.num_parts if self.partition else 1

    @property
    def backend(self) -> str:
        """torch.distributed's backend: `nccl` or `gloo`."""
        return self.cluster.backend

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered into pools rather than kept in place."""
        return gathers_for_passes(self.partition, offload_state=self.offload_state)

    @property
    def gathers_updates(self) -> bool:
        """Whether each replica updates its part of weights that stay whole and in place."""
        return gathers_updates(self.partition)

    @property
    def divides_gradients(self) -> bool:
        """Whether a replica has only its part of reduced gradients."""
        return divides_gradients(self.partition)

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Kinds of buffers (`shard`, `moments`) that live in host memory."""
        return offloaded(self.partition, offload_state=self.offload_state)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def world_size(self) -> int:
        return self.num_replicas * self.num_pipeline_ranks

    @property
    def replica_batch_size(self) -> int:
        return self.num_micro_batches * self.micro_batch_size

    @property
    def global_batch_size(self) -> int:
        return self.num_replicas * self.replica_batch_size

    def forward_only(self) -> "Plan":
        """The plan of an evaluation: the same stages without backward."""
        return replace(self, schedule=Schedule.FORWARD, programs=self.evaluation, evaluation=())

    @property
    def grid(self) -> Grid:
        """Which world rank is which replica's which pipeline rank."""
        return Grid(
            num_replicas=self.num_replicas,
            num_pipeline_ranks=self.num_pipeline_ranks,
            layout=self.layout,
            partition_group_size=self.partition_group_size,
        )

    def world_rank(self, pipeline_rank: int, replica: int) -> int:
        """torch.distributed's rank of a replica's pipeline rank."""
        return self.grid.world_rank(pipeline_rank, replica)

    def coordinates(self, world_rank: int) -> tuple[int, int]:
        """(pipeline rank, replica) of a world rank."""
        return self.grid.coordinates(world_rank)
