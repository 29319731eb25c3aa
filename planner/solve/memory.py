"""Memory of a pipeline rank by class: bytes of each layer under one choice.

    state             weights and optimizer slots, or a replica's part of them; tied gradients
    gather buffers    whole weights of the stages in use, where a pass gathers them
    gradient buffers  gradient sums of the stages in backward
    activations       M micro-batches of what backward needs, or of stage inputs with recompute
    transient         what one stage holds while it is computed, summed, moved or updated

This module knows what a choice makes of a layer's bytes. It does not know when they are there, nor
limits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.partitions import divides_gradients, gathers_for_passes, offloaded
from planner.solve.choices import Choice
from planner.solve.crossings import Crossings
from planner.solve.figures import Figures, ParameterFigures
from planner.solve.problem import Problem
from planner.solve.tables import Table

__all__ = [
    "Held", "Layers", "fixed_bytes", "less", "most", "num_buffers", "parameters_of", "per_shard",
    "reduced_bytes", "times", "total",
]  # fmt: skip

Layers = Sequence[int]
"""Bytes per layer, or per cut."""


def num_buffers(choice: Choice) -> int:
    """Size of each pool of weight and gradient buffers: never more than a rank has stages."""
    return min(choice.num_buffers, choice.stages_per_rank)


def parameters_of(figures: Figures, choice: Choice) -> ParameterFigures:
    """On one pipeline rank a tied parameter is held once, else on each rank that uses it."""
    return figures.parameters_once if _ties_meet(figures, choice) else figures.parameters


def _ties_meet(figures: Figures, choice: Choice) -> bool:
    """Whether one rank holds all layers that share weights: the only one, or that of both ends."""
    if choice.num_pipeline_ranks == 1:
        return True
    tied, ranks = figures.parameters.tied_weight_bytes, choice.stage_ranks
    return ranks[0] == ranks[-1] and not any(tied[1:-1])


def per_shard(counts: Iterable[int], choice: Choice) -> list[int]:
    """What one replica holds of each count that a partition divides, rounded up."""
    return [-(-count // choice.num_parts) for count in counts]


def reduced_bytes(counts: Iterable[int], choice: Choice) -> list[int]:
    """What one replica holds of reduced gradients."""
    return per_shard(counts, choice) if divides_gradients(choice.partition) else list(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the memory tables of a choice are made of: bytes per layer."""

    figures: Figures
    choice: Choice
    problem: Problem
    crossings: Crossings
    unit: int

    def table(
        self, layers: Layers | int, *, entry: Layers | int = 0, leave: Layers | int = 0
    ) -> Table:
        """In units, rounded up."""

        def rounded(values: Layers | int) -> Layers | int:
            if isinstance(values, int):
                return -(-values // self.unit)
            return [-(-value // self.unit) for value in values]

        each = [layers] * self.figures.num_layers if isinstance(layers, int) else layers
        found = rounded(each)
        assert not isinstance(found, int)
        return Table.of(found, entry=rounded(entry), leave=rounded(leave))

    @property
    def reduces(self) -> bool:
        return self.choice.num_replicas > 1

    @property
    def updates_on_host(self) -> bool:
        return self.problem.updates_on_host

    @property
    def is_pipeline(self) -> bool:
        return self.choice.num_pipeline_ranks > 1

    @property
    def trainable(self) -> list[int]:
        """Of a stage's own, untied parameters."""
        found = parameters_of(self.figures, self.choice)
        return less(found.trainable_bytes, found.tied_trainable_bytes)

    @property
    def weights(self) -> list[int]:
        found = parameters_of(self.figures, self.choice)
        return less(found.weight_bytes, found.tied_weight_bytes)

    @property
    def moments(self) -> list[int]:
        slots = self.problem.optimizer_slots
        shards = per_shard(parameters_of(self.figures, self.choice).trainable_bytes, self.choice)
        return times(slots, shards)

    @property
    def shards(self) -> list[int]:
        """Of weights that are gathered for passes; nothing where they stay in place."""
        if not self.gathers:
            return [0] * self.figures.num_layers
        return per_shard(parameters_of(self.figures, self.choice).shard_bytes, self.choice)

    @property
    def in_place(self) -> list[int]:
        """Weights that stay on the device whole, and the masters of mixed precision beside them."""
        found = parameters_of(self.figures, self.choice)
        return total(found.weight_bytes, per_shard(found.master_bytes, self.choice))

    @property
    def gathers(self) -> bool:
        return gathers_for_passes(self.choice.partition, offload_state=self.choice.offload_state)

    @property
    def away(self) -> list[int]:
        """Of the state that lives in host memory."""
        kinds = offloaded(self.choice.partition, offload_state=self.choice.offload_state)
        found = [0] * self.figures.num_layers
        for kind, size in (("shard", self.shards), ("moments", self.moments)):
            found = total(found, size) if kind in kinds else found
        return found

    @property
    def staging(self) -> list[int]:
        """What arrives while a sum by direct exchange is under way."""
        is_direct = self.problem.cluster.backend == "gloo" and self.reduces
        if not is_direct:
            return [0] * self.figures.num_layers
        choice = self.choice
        divided = divides_gradients(choice.partition)
        members = choice.num_parts if divided else choice.num_replicas
        return [size - size // members for size in self.trainable]

    @property
    def reduced(self) -> list[int]:
        none = [0] * self.figures.num_layers
        return reduced_bytes(self.trainable, self.choice) if self.reduces else none


def fixed_bytes(figures: Figures, choice: Choice) -> list[int]:
    """Bytes of each pipeline rank that the cuts do not change."""
    count = choice.num_micro_batches
    each = figures.module_buffer_bytes + count * figures.batch_bytes
    found = [each] * choice.num_pipeline_ranks
    if choice.num_replicas == 1 and choice.num_stages > 1 and _ties_meet(figures, choice):
        # Gradients of weights tied within a rank are kept per micro-batch, for the order of sums.
        found[choice.stage_ranks[0]] += count * figures.tied_part_bytes
    return found


def total(*columns: Sequence[int]) -> list[int]:
    return [sum(row) for row in zip(*columns, strict=True)]


def less(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


def most(*columns: Sequence[int]) -> list[int]:
    return [max(row) for row in zip(*columns, strict=True)]


def times(factor: int, column: Sequence[int]) -> list[int]:
    return [factor * number for number in column]
