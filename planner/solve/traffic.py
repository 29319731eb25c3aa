"""What a choice makes travel: boundary tensors along the ring, weights and gradients in groups.

Which tensors a stage receives depends on both of its cuts. Here it depends on one: a tensor counts
at a cut where a stage of mean length before it holds the tensor and one after it reads it. That
is exact where tensors pass from layer to layer, and near it for skip connections.
This module knows links and cuts. It does not know time steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from planner.cluster.types import CollectiveAlgorithm, Link
from planner.cost import all_reduce_seconds, gather_seconds, reduce_scatter_seconds
from planner.partitions import divides_gradients
from planner.solve.choices import Choice
from planner.solve.figures import Figures
from planner.solve.memory import reduced_bytes
from planner.solve.mesh import RankKind

__all__ = [
    "Collectives", "RingTraffic", "affine", "collectives", "hop_seconds", "ring_traffic",
    "tied_seconds",
]  # fmt: skip

Messages = tuple[tuple[int, int], ...]
"""Per cut: (number of messages, their bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingTraffic:
    """Per cut (length L + 1), for one micro-batch."""

    there: Messages
    """From the stage that ends there to the one that begins there."""
    back: Messages
    """The same for the gradients on their way back."""
    received: tuple[int, ...]
    """Number of messages that a stage which begins there receives."""
    sent: tuple[int, ...]
    """That a stage which ends there sends."""
    gradients_sent: tuple[int, ...]
    """That a stage which begins there sends back."""
    gradients_received: tuple[int, ...]


def ring_traffic(figures: Figures, choice: Choice) -> RingTraffic:
    """Transfers between pipeline ranks; none on one rank, which keeps what its stages pass on."""
    num_cuts, ranks = figures.num_layers + 1, choice.num_pipeline_ranks
    numbers, sizes, entries, exits = ([[0, 0] for _ in range(num_cuts)] for _ in range(4))
    reach, stage_ranks = math.ceil(figures.num_layers / choice.num_stages), choice.stage_ranks
    for passage in figures.passages if ranks > 1 else ():
        ends = (passage.holder, passage.reader)
        first, last = (layer * choice.num_stages // figures.num_layers for layer in ends)
        if first + 1 < last and stage_ranks[first] == stage_ranks[last]:
            continue  # in equal stages, both ends are on one rank
        for cut in range(passage.holder + 1, passage.reader + 1):
            # After one round of the ring every rank of the tensor's readers has it.
            forward = cut - passage.maker <= ranks * reach
            held, read = cut - passage.holder <= reach, passage.reader - cut < reach
            for direction, travels in enumerate((forward, passage.requires_grad)):
                numbers[cut][direction] += travels and held and read
                sizes[cut][direction] += passage.num_bytes * (travels and held and read)
                entries[cut][direction] += travels and read
                exits[cut][direction] += travels and held
    messages = [
        tuple((n[direction], s[direction]) for n, s in zip(numbers, sizes, strict=True))
        for direction in (0, 1)
    ]
    return RingTraffic(
        there=messages[0],
        back=messages[1],
        received=tuple(there for there, _ in entries),
        sent=tuple(there for there, _ in exits),
        gradients_sent=tuple(back for _, back in entries),
        gradients_received=tuple(back for _, back in exits),
    )


def hop_seconds(messages: Messages, link: Link) -> list[float]:
    """Per cut: messages one after the other (Hockney's latency and bandwidth for each)."""
    return [
        number * link.latency_seconds + num_bytes / link.bandwidth for number, num_bytes in messages
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """Seconds per byte and per stage of data-parallel transfers of one pipeline rank."""

    gather: float
    """Per byte of whole weights."""
    gather_latency: float
    reduce: float
    reduce_latency: float


def collectives(choice: Choice, kind: RankKind, algorithm: CollectiveAlgorithm) -> Collectives:
    """Gathers of weights and sums of gradients over the replicas of a rank."""
    replicas, parts = choice.num_replicas, choice.grid.num_parts

    def sum_whole(count: int) -> float:
        return all_reduce_seconds(count, replicas, kind.group_link, algorithm)

    def sum_in_parts(count: int) -> float:
        inside = reduce_scatter_seconds(count, parts, kind.part_link, algorithm)
        if parts == replicas:
            return inside
        part, groups = -(-count // parts), replicas // parts
        return inside + all_reduce_seconds(part, groups, kind.copy_link, algorithm)

    divided = divides_gradients(choice.partition)
    reduce, reduce_latency = affine(sum_in_parts if divided else sum_whole)
    gather, gather_latency = affine(
        lambda count: gather_seconds(count, parts, kind.part_link, algorithm)
    )
    return Collectives(
        gather=gather,
        gather_latency=gather_latency,
        reduce=reduce,
        reduce_latency=reduce_latency,
    )


def tied_seconds(figures: Figures, choice: Choice, link: Link) -> float:
    """To add gradients of tied weights between two ranks, after everything else."""
    (num_bytes,) = reduced_bytes([figures.tied_bytes], choice)
    return all_reduce_seconds(num_bytes, 2, link)


def affine(seconds: Callable[[int], float]) -> tuple[float, float]:
    """(seconds per item, seconds of latency) where time is affine in the number of items."""
    probe = 1 << 30
    slope = (seconds(2 * probe) - seconds(probe)) / probe
    return slope, max(0.0, seconds(probe) - slope * probe)
