"""Memory of a pipeline rank by class: figures per layer and per cut, and their sum for a split.

    state             weights and optimizer slots; 1 / D of them with partition 3
    gather buffers    whole weights of the stages in use (partition 3)
    gradient buffers  gradient sums of the stages in backward, one reduced shard, what a sum stages
    gradients         all of them, where updates wait for the end of the step
    activations       M micro-batches of what backward needs, or of stage inputs with recompute
    transient         what one micro-batch holds only while it is computed or handed over

It is an estimate that is linear in the cuts; the simulator accounts for every buffer of the
finished program. This module does not know limits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.solve.choices import Choice
from planner.solve.figures import Figures, ParameterFigures

__all__ = [
    "MemoryFigures", "bytes_by_class", "fixed_bytes", "memory_figures", "num_buffers",
    "parameters_of", "per_shard",
]  # fmt: skip


def num_buffers(choice: Choice) -> int:
    """Size of each pool of weight and gradient buffers: two, so that one fills beside compute."""
    return min(2, choice.stages_per_rank)


def parameters_of(figures: Figures, choice: Choice) -> ParameterFigures:
    """On one pipeline rank a tied parameter is held once, else on each rank that uses it."""
    return figures.parameters_once if choice.num_pipeline_ranks == 1 else figures.parameters


def per_shard(counts: Iterable[int], choice: Choice) -> list[int]:
    """What one replica holds of each count, rounded up."""
    shards = choice.num_replicas if choice.partition else 1
    return [-(-count // shards) for count in counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFigures:
    """Bytes per layer or per cut, by class, under one choice."""

    state: list[int]
    gather: list[int]
    gradient: list[int]
    activation: list[int]
    rebuilt: list[int]
    """Of one recomputed micro-batch."""
    entry: list[int]
    """Per cut: activations a stage that begins there keeps of earlier layers' tensors."""
    exit: list[int]
    """Per cut: activations a stage that ends there does not keep after all."""
    rebuilt_exit: list[int]

    @property
    def kept(self) -> list[int]:
        return _sum(self.state, self.activation)

    @property
    def buffers(self) -> list[int]:
        return _sum(self.gather, self.gradient)


def memory_figures(
    figures: Figures, choice: Choice, optimizer_slots: int, *, updates_wait: bool, stages_sums: bool
) -> MemoryFigures:
    """The memory of each layer and cut under a choice.

    `stages_sums`: a sum over replicas makes a gradient's worth of buffers while it is under way,
    as direct exchange does (gloo).
    """
    parameters, count = parameters_of(figures, choice), choice.num_micro_batches
    trainable = parameters.trainable_bytes
    buffers, replicas = num_buffers(choice), choice.num_replicas
    no_layers, no_cuts = [0] * figures.num_layers, [0] * (figures.num_layers + 1)
    batch = [count * num_bytes for num_bytes in figures.layer_batch_bytes]
    saved = list(figures.saved_bytes)
    sums = [(1 if replicas == 1 else buffers) * num_bytes for num_bytes in trainable]
    reduced = per_shard(trainable, choice) if choice.partition else no_layers
    waiting = no_layers
    if updates_wait:
        waiting, reduced = per_shard(trainable, choice), no_layers
        sums = no_layers if replicas == 1 else sums
    elif stages_sums and replicas > 1:
        sums = _sum(sums, trainable)
    return MemoryFigures(
        state=_sum(
            per_shard(parameters.weight_bytes, choice),
            per_shard((optimizer_slots * num_bytes for num_bytes in trainable), choice),
            waiting,
        ),
        gather=[buffers * b for b in parameters.weight_bytes] if choice.partition else no_layers,
        gradient=_sum(sums, reduced),
        activation=batch if choice.recompute else _sum(batch, [count * b for b in saved]),
        rebuilt=saved if choice.recompute else no_layers,
        entry=[
            count * b
            for b in (figures.crossing_bytes if choice.recompute else figures.entry_saved_bytes)
        ],
        exit=no_cuts if choice.recompute else [count * b for b in figures.exit_unsaved_bytes],
        rebuilt_exit=list(figures.exit_unsaved_bytes) if choice.recompute else no_cuts,
    )


def fixed_bytes(figures: Figures, choice: Choice) -> list[int]:
    """Bytes of each pipeline rank that the cuts do not change."""
    ranks, count = choice.num_pipeline_ranks, choice.num_micro_batches
    transient = figures.transient_bytes
    found = [max(transient[1:-1], default=0)] * ranks
    # The first and the last layer, often the largest, sit on known ranks.
    found[0] = max(found[0], transient[0])
    found[-1] = max(found[-1], transient[-1])
    shared = count * figures.batch_bytes
    if ranks > 1:
        shared += 2 * (max(figures.crossing_bytes) + max(figures.gradient_crossing_bytes))
    elif choice.num_replicas == 1 and choice.stages_per_rank > 1:
        # Gradients of weights tied within a rank are kept per micro-batch, for the order of sums.
        shared += count * figures.tied_bytes
    return [shared + num_bytes for num_bytes in found]


def bytes_by_class(
    figures: Figures,
    choice: Choice,
    memory: MemoryFigures,
    boundaries: Sequence[int],
    rank: int,
) -> dict[str, int]:
    """Bytes of one pipeline rank under a split, class by class."""
    spans = [
        range(boundaries[stage], boundaries[stage + 1])
        for stage in range(rank, choice.num_stages, choice.num_pipeline_ranks)
    ]
    cuts = [memory.entry[span.start] - memory.exit[span.stop] for span in spans]
    rebuilt = [_total(memory.rebuilt, span) - memory.rebuilt_exit[span.stop] for span in spans]
    largest = max(spans, key=lambda span: _total(memory.buffers, span))
    return {
        "state": sum(_total(memory.state, span) for span in spans),
        "gather buffers": _total(memory.gather, largest),
        "gradient buffers": _total(memory.gradient, largest),
        "activations": sum(_total(memory.activation, span) for span in spans) + sum(cuts),
        "transient": fixed_bytes(figures, choice)[rank] + max(rebuilt),
    }


def _total(layers: Sequence[int], span: range) -> int:
    return sum(layers[span.start : span.stop])


def _sum(*columns: Sequence[int]) -> list[int]:
    return [sum(row) for row in zip(*columns, strict=True)]
