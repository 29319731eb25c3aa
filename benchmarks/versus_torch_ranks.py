"""One rank of versus_torch: builds every contender, checks and weighs it, then times them in turns.

All contenders stay alive side by side in the same processes, so that each round runs all of them
within a second or two of each other. This module knows processes and clocks. It does not know what
a contender does.
"""

import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from versus_torch_memory import Memory
from versus_torch_model import Sizes, loss_fn, model_file, seeded_layers
from versus_torch_ours import OurContender
from versus_torch_theirs import Batch, DataParallel, Observe, Part, Pipelined, make_theirs

from planner.heap import keep_freed_memory
from planner.plan.types import Plan

__all__ = ["Entry", "Measured", "measure"]

_STRIDE = 5
"""Places by which the order turns from round to round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender to be built on every rank."""

    name: str
    plan: Plan | None = None
    """Ours."""
    theirs: Pipelined | DataParallel | None = None
    boundaries: tuple[int, ...] = ()
    """Of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One contender."""

    name: str
    difference: float
    """Largest difference of a gradient from plain accumulation in one process, over the largest
    gradient of the same parameter."""
    seconds: tuple[float, ...]
    """Of each round: the slowest rank's step."""
    cpu_seconds: tuple[float, ...]
    """Of each round: of all threads of all ranks. What others do on the machine shows less."""
    peak_bytes: tuple[int, ...]
    """Per rank."""


class Contender(Protocol):
    def step(self, batch: Batch, observe: Observe | None = None) -> None:
        """One update; `observe` sees the gradients just before it."""


def measure(
    sizes: Sizes, entries: Sequence[Entry], num_ranks: int, num_rounds: int
) -> list[Measured]:
    """Run the contenders on so many processes of this machine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = multiprocessing.spawn(
        _run_rank, (sizes, tuple(entries), num_ranks, num_rounds, results), num_ranks, join=False
    )
    while not processes.join(timeout=1.0):
        if not results.empty():
            found: list[Measured] = results.get()
            processes.join()
            return found
    return results.get()


def _run_rank(
    rank: int, sizes: Sizes, entries: Sequence[Entry], num_ranks: int, num_rounds: int, results: Any
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    batch = _batch(sizes)
    wanted = _plain_gradients(sizes, batch)
    built = [_build(sizes, entry, batch, wanted) for entry in entries]
    seconds = _time_in_turns([found.contender for found in built], batch, num_rounds)
    measured = [_gathered(found, times) for found, times in zip(built, seconds, strict=True)]
    if rank == 0:
        results.put(measured)
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """A contender on this rank after its first steps."""

    name: str
    contender: Contender
    difference: float
    peak_bytes: int


def _batch(sizes: Sizes) -> Batch:
    torch.manual_seed(1)
    return model_file(sizes).example_batch(sizes.global_batch_size)


def _plain_gradients(sizes: Sizes, batch: Batch) -> dict[str, Tensor]:
    """By accumulation in one process, in flat order."""
    model, size = seeded_layers(sizes), sizes.micro_batch_size
    pairs = list(zip(batch["tokens"].split(size), batch["targets"].split(size), strict=True))
    for tokens, targets in pairs:
        (loss_fn(model(tokens), targets) / len(pairs)).backward()
    return {name: _flat_gradient(parameter) for name, parameter in model.named_parameters()}


def _flat_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.reshape(-1)


def _build(sizes: Sizes, entry: Entry, batch: Batch, wanted: Mapping[str, Tensor]) -> _Built:
    """Built, compared in its first step, and weighed in its third."""
    memory = Memory([*batch.values(), *wanted.values()])
    comparison = _Comparison(wanted)
    with memory.watching():
        contender: Contender
        if entry.plan is not None:
            contender = OurContender(sizes, entry.plan, memory)
        else:
            assert entry.theirs is not None
            contender = make_theirs(sizes, entry.theirs, entry.boundaries)
        contender.step(batch, comparison)
        contender.step(batch)
        memory.restart()
        contender.step(batch)
    return _Built(
        name=entry.name,
        contender=contender,
        difference=comparison.over_all_ranks(),
        peak_bytes=memory.peak_bytes,
    )


class _Comparison:
    """Of a contender's gradients with those of one process."""

    def __init__(self, wanted: Mapping[str, Tensor]) -> None:
        self._wanted = wanted
        self._largest = 0.0
        self._seen: set[tuple[str, int, int]] = set()

    def __call__(self, parts: Iterator[Part]) -> None:
        for name, first, values in parts:
            whole = self._wanted[name]
            gap = (values - whole[first : first + values.numel()]).abs().max()
            self._largest = max(self._largest, float(gap / whole.abs().max()))
            self._seen.add((name, first, values.numel()))

    def over_all_ranks(self) -> float:
        """The largest difference; infinite where an element was seen by no rank."""
        found = _on_all_ranks((self._largest, self._seen))
        num_seen = sum(number for _, _, number in set().union(*(seen for _, seen in found)))
        is_complete = num_seen == sum(whole.numel() for whole in self._wanted.values())
        return max(largest for largest, _ in found) if is_complete else math.inf


def _time_in_turns(
    contenders: Sequence[Contender], batch: Batch, num_rounds: int
) -> list[tuple[tuple[float, float], ...]]:
    """Seconds and CPU seconds of each contender in each round; every round begins with another."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for turn in range(num_rounds):
        for place in range(len(contenders)):
            index = (place + turn * _STRIDE) % len(contenders)
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            contenders[index].step(batch)
            end, cpu_end = time.perf_counter(), time.process_time()
            seconds[index].append((end - start, cpu_end - cpu_start))
    return [tuple(times) for times in seconds]


def _gathered(built: _Built, seconds: tuple[tuple[float, float], ...]) -> Measured:
    """The slowest rank's seconds, all ranks' CPU seconds, and every rank's peak."""
    found = _on_all_ranks((seconds, built.peak_bytes))
    rounds = list(zip(*(times for times, _ in found), strict=True))
    return Measured(
        name=built.name,
        difference=built.difference,
        seconds=tuple(max(wall for wall, _ in ranks) for ranks in rounds),
        cpu_seconds=tuple(sum(cpu for _, cpu in ranks) for ranks in rounds),
        peak_bytes=tuple(peak for _, peak in found),
    )


def _on_all_ranks(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
