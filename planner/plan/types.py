"""The Plan: the static instruction program of every pipeline rank, and all it refers to.

An instruction belongs to a stream and names the buffers that it reads and writes. Streams run
beside each other; an instruction starts when its predecessor in its stream and the last
conflicting uses of its buffers are done. Nothing else orders them.

Buffer names
    <tensor>.<m>            boundary tensor of micro-batch m (a stage's input or output)
    gradient:<tensor>.<m>   its gradient, on its way back
    batch:<key>.<m>         one key of the batch
    saved:<stage>.<m>       what forward keeps for backward
    loss.<m>                loss of micro-batch m
    shard:<unit>            this rank's own part of a unit's weights and optimizer state
    weights:<pool>.<i>      gather buffer i of a pool; `weights:<unit>` where nothing is partitioned
    sum:<pool>.<i>          gradient accumulation buffer i of a pool
    part:<unit>.<m>         gradient of a tied unit for one micro-batch (kept for exact order)
    reduced:<unit>          this rank's part of the gradient reduced over replicas
"""

from dataclasses import dataclass
from enum import StrEnum

from planner.cluster.types import Cluster
from planner.graph import ParameterSpec, TensorSpec
from planner.plan.code import Statement

__all__ = ["Instruction", "Opcode", "Plan", "PlanOptions", "Prediction", "StagePlan", "Unit"]

FORMAT_VERSION = 1


class Opcode(StrEnum):
    """Every instruction, with what it does."""

    LOAD = "LOAD"
    """batch:<key>.<m> = rows m*b .. (m+1)*b of the replica's batch, for each key written"""
    GATHER = "GATHER"
    """weights:<buffer> = concatenation over replicas of shard:<unit>"""
    RELEASE = "RELEASE"
    """weights:<buffer> no longer holds the unit; its memory may be taken by another"""
    RECEIVE = "RECEIVE"
    """written buffer = what the peer's matching SEND reads"""
    SEND = "SEND"
    """the peer's matching RECEIVE = read buffer"""
    FORWARD = "FORWARD"
    """outputs, saved = stage(inputs; weights); with recompute, saved is not written"""
    RECOMPUTE = "RECOMPUTE"
    """saved = stage(inputs; weights), with the random keys of the FORWARD"""
    BACKWARD = "BACKWARD"
    """input gradients = backward(saved, output gradients); sum += parameter gradients"""
    REDUCE = "REDUCE"
    """reduced:<unit> = my part of the sum over replicas of sum:<buffer>"""
    REDUCE_TIED = "REDUCE_TIED"
    """reduced:<unit> = sum over the pipeline ranks that share the unit, equal on all of them"""
    UPDATE = "UPDATE"
    """shard:<unit> = optimizer(shard:<unit>, reduced:<unit>)"""
    FETCH = "FETCH"
    """(reserved) bring offloaded bytes to the device"""
    EVICT = "EVICT"
    """(reserved) move bytes off the device"""
    CHECK_FINITE = "CHECK_FINITE"
    """(reserved) stop the update everywhere if a gradient is not finite"""
    CLIP = "CLIP"
    """(reserved) scale gradients to the global norm"""
    SAVE = "SAVE"
    """(reserved) write a checkpoint"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a program."""

    opcode: Opcode
    stream: str
    """`compute`, `data`, `copy`, or `to.<peer>` / `from.<peer>`: the pipeline's own streams, one
    per peer and direction, so that no transfer waits behind another pair's."""
    stage: int | None = None
    micro_batch: int | None = None
    unit: str | None = None
    peer: int | None = None
    """Pipeline rank at the other end (SEND, RECEIVE)."""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """A buffer that is both read and written (accumulation) stands in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that are gathered, reduced and updated together: one flat vector.

    Each stage has one unit per dtype for the parameters it alone uses; parameters that several
    stages use (tied) have units of their own, on every rank that uses them.
    """

    name: str
    dtype: str
    parameters: tuple[str, ...]
    """In flat order."""
    num_elements: int
    """Unpadded length of the flat vector."""
    stages: tuple[int, ...]
    """Stages that use it, ascending."""
    ranks: tuple[int, ...]
    """Pipeline ranks that hold it, ascending; more than one for tied units only."""
    trainable: bool = True
    """False where no parameter of it is trained: it has no gradient, reduction or update."""
    exact: bool = False
    """Tied between stages of one rank: gradients are kept per micro-batch and added in the
    order in which plain accumulation adds them, so that the sum is bitwise equal."""


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
    forward_seconds: float = 0.0
    """Predicted for one micro-batch."""
    backward_seconds: float = 0.0
    """Predicted for one micro-batch, recompute not included."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the plan says the run will cost."""

    step_seconds: float
    bubble: float
    """Idle part of the compute streams over the step: 1 - busy / (ranks x step)."""
    peak_bytes: tuple[int, ...]
    """Per pipeline rank."""
    memory_limit_bytes: int
    provenance: str


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

    @property
    def backend(self) -> str:
        """torch.distributed's backend: `nccl` or `gloo`."""
        return self.cluster.backend

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

    def world_rank(self, pipeline_rank: int, replica: int) -> int:
        """Replicas innermost."""
        return pipeline_rank * self.num_replicas + replica

    def coordinates(self, world_rank: int) -> tuple[int, int]:
        """(pipeline rank, replica) of a world rank."""
        return divmod(world_rank, self.num_replicas)
