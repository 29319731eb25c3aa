"""What a pipeline rank keeps in memory, by class: the solver's estimate.

Knows sizes of stages and the rules by which buffers are shared. It is an upper estimate made
before any program exists; the exact peak of a plan is counted from its instructions. Does not
know devices: reserved memory and the limit are compared elsewhere.

Partition 0 keeps the whole state on every replica; partition 3 shards weights, gradients and
optimizer over the replicas (Rajbhandari et al., "ZeRO", SC 2020, its stage 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "RankBytes",
    "StageBytes",
    "gather_buffer_bytes",
    "gradient_buffer_bytes",
    "rank_bytes",
    "state_bytes",
    "stored_bytes",
    "working_bytes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Sizes of one stage, for one micro-batch where that matters."""

    weight_bytes: int
    """Of all its parameters, frozen ones included."""
    gradient_bytes: int
    """Of its trainable parameters' gradients, in the dtype they accumulate in."""
    input_bytes: int
    """Of the boundary tensors and batch keys that it takes."""
    saved_bytes: int
    """Everything kept from forward to backward without recompute, kept inputs included."""
    transient_bytes: int
    """Largest extra need of its forward or backward, boundary gradients included."""
    recompute: bool
    """Keep only the inputs, and run forward again before backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Peak memory of one pipeline rank, by class."""

    state: int
    gather_buffers: int
    gradient_buffers: int
    stored: int
    working: int

    @property
    def total(self) -> int:
        return self.state + self.gather_buffers + self.gradient_buffers + self.stored + self.working


def state_bytes(
    unit_bytes: Sequence[int], *, optimizer_slots: int, partition: int, num_replicas: int
) -> int:
    """Weights and optimizer slots of a rank's units, slots being as large as the weights.

    Under partition 3 each unit's share is 1 / D of it, rounded up (flat vectors are padded to
    the number of replicas).
    """
    num_shards = num_replicas if partition else 1
    return (1 + optimizer_slots) * sum(_share(unit, num_shards) for unit in unit_bytes)


def gather_buffer_bytes(
    stage_weight_bytes: Sequence[int], *, num_weight_buffers: int, partition: int
) -> int:
    """Buffers that sharded weights are gathered into, each as large as the largest stage.

    0 under partition 0, where the weights are used in place.
    """
    return num_weight_buffers * max(stage_weight_bytes, default=0) if partition else 0


def gradient_buffer_bytes(
    stage_gradient_bytes: Sequence[int],
    *,
    num_gradient_buffers: int,
    partition: int,
    num_replicas: int,
) -> int:
    """Buffers that gradients accumulate in, each as large as the largest stage.

    Under partition 3 one reduced shard (1 / D of a stage) stands beside them: a stage is updated
    as soon as it is reduced, so there is one at a time.
    """
    largest = max(stage_gradient_bytes, default=0)
    reduced = _share(largest, num_replicas) if partition else 0
    return num_gradient_buffers * largest + reduced


def stored_bytes(stages: Sequence[StageBytes], *, num_micro_batches: int) -> int:
    """Kept from forward to backward, for all micro-batches of all stages of a rank.

    The layered order finishes every forward before the first backward, so all M micro-batches of
    every stage are alive at once: its inputs where it recomputes, else all it saves.
    """
    per_micro_batch = sum(
        stage.input_bytes if stage.recompute else stage.saved_bytes for stage in stages
    )
    return num_micro_batches * per_micro_batch


def working_bytes(stages: Sequence[StageBytes]) -> int:
    """Needed while one stage runs one micro-batch, on top of what is stored.

    A stage that recomputes holds all it saves for that micro-batch too.
    """
    return max(
        (stage.transient_bytes + (stage.saved_bytes if stage.recompute else 0) for stage in stages),
        default=0,
    )


def rank_bytes(
    stages: Sequence[StageBytes],
    *,
    num_micro_batches: int,
    num_replicas: int,
    partition: int,
    optimizer_slots: int,
    num_weight_buffers: int,
    num_gradient_buffers: int,
) -> RankBytes:
    """Peak memory of a rank that holds `stages`, by class, taking each class at its own peak."""
    weights = [stage.weight_bytes for stage in stages]
    return RankBytes(
        state=state_bytes(
            weights,
            optimizer_slots=optimizer_slots,
            partition=partition,
            num_replicas=num_replicas,
        ),
        gather_buffers=gather_buffer_bytes(
            weights, num_weight_buffers=num_weight_buffers, partition=partition
        ),
        gradient_buffers=gradient_buffer_bytes(
            [stage.gradient_bytes for stage in stages],
            num_gradient_buffers=num_gradient_buffers,
            partition=partition,
            num_replicas=num_replicas,
        ),
        stored=stored_bytes(stages, num_micro_batches=num_micro_batches),
        working=working_bytes(stages),
    )


def _share(num_bytes: int, num_shards: int) -> int:
    return -(-num_bytes // num_shards)
