"""Where each boundary tensor travels, and its gradient back.

A tensor passes along its *chain*: the stage that makes it, then every stage that reads it, in
order. Each reader hands it on to the next, and the gradient returns along the same chain, each
reader adding its part to what the later ones found. That is the order in which autograd adds them
when the whole model runs at once, so a tensor with several readers keeps its gradient bitwise; and
no rank receives a tensor twice.
"""

from dataclasses import dataclass

from planner.graph import LayerGraph
from planner.solve.types import Placement

__all__ = ["Route", "make_routes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The travels of one boundary tensor."""

    tensor: str
    requires_grad: bool
    chain: tuple[int, ...]
    """Maker stage, then reader stages ascending; at least two."""
    ranks: tuple[int, ...]
    """Pipeline rank of each stage of the chain."""

    def forward_hops(self) -> list[tuple[int, int]]:
        """(position from, position to) in the chain for each transfer between ranks.

        A rank that already holds the tensor keeps it for its later stages.
        """
        holders: set[int] = set()
        hops = []
        for position, rank in enumerate(self.ranks):
            if position and rank not in holders:
                hops.append((position - 1, position))
            holders.add(rank)
        return hops

    def backward_hops(self) -> list[tuple[int, int]]:
        """(position from, position to) for each transfer of the gradient, last reader first."""
        if not self.requires_grad:
            return []
        return [
            (position, position - 1)
            for position in range(len(self.chain) - 1, 0, -1)
            if self.ranks[position] != self.ranks[position - 1]
        ]


def make_routes(graph: LayerGraph, placement: Placement) -> tuple[Route, ...]:
    """Routes of all tensors that pass between stages, in order of creation."""
    stage_of = [
        stage
        for stage in range(placement.num_stages)
        for _ in range(placement.boundaries[stage], placement.boundaries[stage + 1])
    ]
    makers, readers = graph.makers, graph.readers
    routes = []
    for tensor in graph.tensors:
        maker = stage_of[makers[tensor.name]]
        chain = (maker, *sorted({stage_of[reader] for reader in readers[tensor.name]} - {maker}))
        if len(chain) > 1:
            routes.append(
                Route(
                    tensor=tensor.name,
                    requires_grad=tensor.requires_grad,
                    chain=chain,
                    ranks=tuple(placement.stage_ranks[stage] for stage in chain),
                )
            )
    return tuple(routes)
