"""Small Python objects among all ranks, and figures of the whole run, over any transport.

This module knows bytes. It does not know what the objects are.
"""

import pickle
from typing import TypeVar

import torch
from torch import Tensor

from runtime.transport import Transport

__all__ = ["gather_objects", "sum_over_ranks"]

Value = TypeVar("Value")


def gather_objects(
    transport: Transport, value: Value, rank: int, num_ranks: int, device: torch.device, what: str
) -> list[Value]:
    """Every rank's value, by world rank, on every rank.

    Raises:
        RunError: a rank was lost, or a deadline passed.
    """
    data = pickle.dumps(value)
    sizes = [0] * num_ranks
    sizes[rank] = len(data)
    found = sum_over_ranks(transport, sizes, device, what).long().tolist()
    first, last = sum(found[:rank]), sum(found[: rank + 1])
    # Each rank fills a part of its own, so the sum over ranks is all parts together.
    everything = torch.zeros(sum(found), dtype=torch.uint8, device=device)
    everything[first:last] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    transport.all_reduce_world(everything, what).wait()
    parts = everything.cpu().split(found)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]


def sum_over_ranks(
    transport: Transport, figures: list[int] | list[float], device: torch.device, what: str
) -> Tensor:
    """The sum of each figure over all ranks, in 64 bits.

    Raises:
        RunError: a rank was lost, or a deadline passed.
    """
    total = torch.tensor(figures, dtype=torch.float64, device=device)
    transport.all_reduce_world(total, what).wait()
    return total.cpu()
