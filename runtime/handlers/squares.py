"""Squares of gradients, for the norm of the whole model's. It knows whose part counts."""

import torch
from torch import Tensor

from runtime.shards import UnitState
from runtime.state import RankState

__all__ = ["square"]


def square(rank: RankState, state: UnitState, gradient: Tensor) -> Tensor:
    """The sum of the squares of this rank's part of a unit's gradient; 0 where another's counts."""
    is_first = rank.rank == state.unit.ranks[0]
    num_counted = rank.plan.num_parts if state.divides_gradients else 1
    if is_first and rank.replica < num_counted:
        return _norm(gradient).double().square()
    return torch.zeros((), dtype=torch.float64, device=rank.device)


def _norm(gradient: Tensor) -> Tensor:
    """In 32 bits at least."""
    is_half = gradient.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32 if is_half else None)
    return norm
