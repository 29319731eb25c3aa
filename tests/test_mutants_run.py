"""What the checker accepts runs, and computes what it should: mutants of real plans are run."""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import accepts
from models import own
from mutations import mutate
from planned import Chain, model_of, plan_of
from running import Numbers, difference, numbers_of
from table_mutations import changed_tables
from torch import nn

from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions
from planner.schedules import Schedule

_TOLERANCE = 1e-5


class TiedEnds(nn.Module):
    """The last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.first(x).relu()).relu()).relu())


def _chain() -> nn.Module:
    return Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), 3)


MODELS: dict[str, Callable[[], ModelFile]] = {
    "chain": lambda: model_of(_chain),
    "tied": lambda: model_of(TiedEnds),
    "skips": lambda: model_of(own.UNet, own.square, own.vectors),
    "frozen": lambda: model_of(own.Frozen, own.square, own.vectors),
    "statistics": lambda: model_of(own.ConvNet, own.classes, own.images),
}
_FOUR = (0, 1, 2, 3, 4)
_SIX = (0, 2, 3, 4, 6)
_ALL = PlanOptions(check_finite=True, clip_norm=0.1, save=True)
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "one rank": ("chain", _FOUR, {}),
    "two ranks": ("chain", _FOUR, {"num_pipeline_ranks": 2}),
    "recompute": ("skips", (0, 2, 3, 5, 6), {"num_pipeline_ranks": 2, "recompute": True}),
    "tied on one rank": ("tied", _FOUR, {}),
    "tied on two ranks": ("tied", _FOUR, {"num_pipeline_ranks": 2}),
    "skips": ("skips", (0, 1, 3, 4, 6), {"num_pipeline_ranks": 2}),
    "frozen": ("frozen", _FOUR, {"num_pipeline_ranks": 2}),
    "statistics": ("statistics", _SIX, {"num_pipeline_ranks": 2}),
    "statistics, recompute": ("statistics", _SIX, {"recompute": True}),
    "offloaded state": ("chain", _FOUR, {"num_pipeline_ranks": 2, "offload_state": True}),
    "offloaded inputs": (
        "skips",
        (0, 1, 3, 4, 6),
        {"num_pipeline_ranks": 2, "offload_inputs": True, "offload_state": True},
    ),
    "ends": ("tied", _FOUR, {"num_pipeline_ranks": 2, "options": _ALL}),
    "replicas": ("chain", _FOUR, {"num_replicas": 2, "num_pipeline_ranks": 2, "options": _ALL}),
    "tied replicas": (
        "tied",
        _FOUR,
        {"num_replicas": 2, "num_pipeline_ranks": 2, "offload_inputs": True},
    ),
    "whole replicas": ("skips", (0, 2, 4, 6), {"num_replicas": 2, "partition": 0}),
    "parts of updates": (
        "chain",
        _FOUR,
        {"num_replicas": 2, "num_pipeline_ranks": 2, "partition": 1, "options": _ALL},
    ),
    "parts of gradients": (
        "tied",
        _FOUR,
        {"num_replicas": 2, "num_pipeline_ranks": 2, "partition": 2, "offload_state": True},
    ),
    "1f1b": ("chain", (0, 2, 4), {"num_pipeline_ranks": 2, "schedule": Schedule.ONE_F_ONE_B}),
    "1f1b replicas": (
        "skips",
        (0, 3, 6),
        {"num_replicas": 2, "num_pipeline_ranks": 2, "schedule": Schedule.ONE_F_ONE_B},
    ),
    "zb-h1": ("tied", (0, 2, 4), {"num_pipeline_ranks": 2, "schedule": Schedule.ZERO_BUBBLE}),
    "plain": ("tied", _FOUR, {"schedule": Schedule.PLAIN, "options": _ALL}),
}


@functools.cache
def case(name: str) -> tuple[ModelFile, Plan, Numbers]:
    """A model, a plan of it, and what the plan computes."""
    model, boundaries, choices = CASES[name]
    model_file = MODELS[model]()
    choices = {"num_micro_batches": 3, "micro_batch_size": 1, **choices}
    plan = plan_of(model_file, boundaries, **choices)
    return model_file, plan, numbers_of(plan, model_file)


def accepted_mutants(plan: Plan, chooser: random.Random) -> Iterator[tuple[str, Plan]]:
    """Mutants without end that the checker finds no fault with."""
    while True:
        kinds, mutant = mutate(plan, chooser)
        if accepts(mutant):
            yield kinds, mutant


def run_mutants(num_mutants: int, seed: int) -> None:
    seen: Counter[str] = Counter()
    for name in CASES:
        model_file, plan, wanted = case(name)
        mutants = accepted_mutants(plan, random.Random(f"{name} {seed}"))
        is_exact = plan.num_replicas == 1 and plan.options.clip_norm is None
        for number in range(-(-num_mutants // len(CASES))):
            kinds, mutant = next(mutants)
            label = f"accepted mutant {number} of {name!r}, seed {seed} ({kinds})"
            try:
                found = numbers_of(mutant, model_file)
            except Exception as error:
                pytest.fail(f"{label} stops: {error!r}")
            what = difference(found, wanted, 0.0 if is_exact else _TOLERANCE)
            assert not what, f"{label}: {what}"
            seen.update(kinds.split(" + "))
    assert len(seen) > 8, seen


@pytest.mark.parametrize("name", ["tied on one rank", "statistics", "offloaded inputs", "zb-h1"])
def test_accepted_changes_of_tables_compute_the_same(name: str) -> None:
    """But for which parameters the model trains, and what it does to its inputs in place: the plan
    alone tells these. (Another word on checkpoints changes what is left of a step, not the step.)
    """
    model_file, plan, wanted = case(name)
    num_accepted = 0
    for what, mutant in changed_tables(plan):
        told = what.startswith(("trainable", "save of", "parameters of"))
        if told or not accepts(mutant):
            continue
        different = difference(numbers_of(mutant, model_file), wanted)
        assert not different, f"{what}: {different}"
        num_accepted += 1
    assert num_accepted > 5


def test_60_accepted_mutants_compute_the_same() -> None:
    run_mutants(60, 0)


@pytest.mark.slow
def test_1_000_accepted_mutants_compute_the_same() -> None:
    run_mutants(1000, 1)
