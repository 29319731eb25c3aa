"""What a choice makes travel: boundary tensors along the ring, weights and gradients in groups.

Which tensors a stage receives depends on both of its cuts. Here it depends on one: a tensor counts
at a cut where a stage of mean length before it holds the tensor and one after it reads it. That
is exact where tensors pass from layer to layer, and near it for skip connections.
This module knows links and cuts. It does not know time steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from planner.cluster.types import Link
from planner.cost import (
    all_reduce_seconds,
    gather_seconds,
    reduce_scatter_seconds,
    transfer_seconds,
)
from planner.solve.choices import Choice
from planner.solve.figures import Figures
from planner.solve.memory import parameters_of, per_shard
from planner.solve.mesh import Mesh

__all__ = ["Collectives", "RingTraffic", "affine", "collectives", "ring_traffic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingTraffic:
    """Per cut (length L + 1), for one micro-batch."""

    hop_seconds: list[list[float]]
    """Per kind of link: from the stage that ends there to the one that begins there."""
    gradient_hop_seconds: list[list[float]]
    """The same for the gradients on their way back."""
    entry_seconds: list[float]
    """Compute time that a stage which begins there loses to the tensors it receives."""
    exit_seconds: list[float]
    """Compute time that a stage which ends there loses to the tensors it sends."""
    gradient_entry_seconds: list[float]
    gradient_exit_seconds: list[float]


def ring_traffic(figures: Figures, choice: Choice, mesh: Mesh) -> RingTraffic:
    """Transfers between pipeline ranks; none on one rank, which keeps what its stages pass on."""
    num_cuts, ranks = figures.num_layers + 1, choice.num_pipeline_ranks
    hops, entries, exits = ([[0, 0] for _ in range(num_cuts)] for _ in range(3))
    reach = math.ceil(figures.num_layers / choice.num_stages)
    for passage in figures.passages if ranks > 1 else ():
        ends = (passage.holder, passage.reader)
        first, last = (layer * choice.num_stages // figures.num_layers for layer in ends)
        if max(1, last - first) % ranks == 0:
            continue  # in equal stages, both ends are on one rank
        for cut in range(passage.holder + 1, passage.reader + 1):
            # After one round of the ring every rank of the tensor's readers has it.
            forward = cut - passage.maker <= ranks * reach
            held, read = cut - passage.holder <= reach, passage.reader - cut < reach
            for direction, travels in enumerate((forward, passage.requires_grad)):
                hops[cut][direction] += passage.num_bytes * (travels and held and read)
                entries[cut][direction] += travels and read
                exits[cut][direction] += travels and held
    seconds = figures.message_seconds
    return RingTraffic(
        hop_seconds=[[_transfer(there, link) for there, _ in hops] for link in mesh.ring_links],
        gradient_hop_seconds=[
            [_transfer(back, link) for _, back in hops] for link in mesh.ring_links
        ],
        entry_seconds=[seconds * there for there, _ in entries],
        exit_seconds=[seconds * there for there, _ in exits],
        gradient_entry_seconds=[seconds * back for _, back in entries],
        gradient_exit_seconds=[seconds * back for _, back in exits],
    )


def _transfer(num_bytes: int, link: Link) -> float:
    return transfer_seconds(num_bytes, link) if num_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """Seconds of data-parallel transfers."""

    gather: list[float]
    """Per layer."""
    reduce: list[float]
    gather_latency: float
    """Per stage."""
    reduce_latency: float
    tied: float
    """To add gradients of tied weights between two ranks, after everything else."""


def collectives(figures: Figures, choice: Choice, mesh: Mesh) -> Collectives:
    """Gathers and reductions over replicas, and over the ranks that share a weight."""
    replicas, link, algorithm = choice.num_replicas, mesh.group_link, mesh.collectives
    parameters = parameters_of(figures, choice)
    reduce_whole = reduce_scatter_seconds if choice.partition else all_reduce_seconds
    reduce, reduce_latency = affine(lambda count: reduce_whole(count, replicas, link, algorithm))
    gather, gather_latency = affine(lambda count: gather_seconds(count, replicas, link, algorithm))
    if not choice.partition:
        gather = gather_latency = 0.0
    tied = 0.0
    if choice.num_pipeline_ranks > 1 and figures.tied_bytes:
        (num_bytes,) = per_shard([figures.tied_bytes], choice)
        tied = max(all_reduce_seconds(num_bytes, 2, link) for link in mesh.ring_links)
    return Collectives(
        gather=[gather * count for count in parameters.weight_bytes],
        reduce=[reduce * count for count in parameters.trainable_bytes],
        gather_latency=gather_latency,
        reduce_latency=reduce_latency,
        tied=tied,
    )


def affine(seconds: Callable[[int], float]) -> tuple[float, float]:
    """(seconds per item, seconds of latency) where time is affine in the number of items."""
    probe = 1 << 30
    slope = (seconds(2 * probe) - seconds(probe)) / probe
    return slope, max(0.0, seconds(probe) - slope * probe)
