"""Every optimizer that works on shards, its fused and foreach forms and parameter groups included.

After three steps with a falling rate, one replica leaves the very bits that plain training leaves,
wherever its state lives. With two replicas the gradients are added in another order, and the
parameters agree to 1e-6.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from planned import Chain, model_of, plan_of
from torch import nn
from training import relative_rms, train_by_plan, train_plainly

from planner.model_file import ModelFile
from planner.plan.types import PlanOptions
from runtime.optimize import ELEMENTWISE_OPTIMIZERS

TOLERANCE = 1e-6
STAGES = (0, 2, 4, 6, 9)
Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2))


MODEL = replace(
    model_of(lambda: Chain(block)),
    build_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
)


def of(name: str, **settings: Any) -> Build:
    return partial(getattr(torch.optim, name), lr=1e-2, **settings)


def groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """No decay on norms and biases, as usual, and half the rate there."""
    whole = list(parameters)
    matrices, others = [p for p in whole if p.ndim > 1], [p for p in whole if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0, "lr": 5e-3},
        ],
        lr=1e-2,
    )


OPTIMIZERS: dict[str, Build] = {
    **{name: of(name) for name in ELEMENTWISE_OPTIMIZERS},
    "SGD momentum": of("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": of("SGD", momentum=0.9, fused=True),
    "Adam amsgrad": of("Adam", amsgrad=True, weight_decay=0.1),
    "Adam fused": of("Adam", fused=True),
    "AdamW foreach": of("AdamW", foreach=True),
    "AdamW fused": of("AdamW", fused=True),
    "AdamW maximize": of("AdamW", maximize=True),
    "Adagrad fused": of("Adagrad", fused=True),
    "RMSprop centered": of("RMSprop", centered=True, momentum=0.5),
    "groups": groups,
}


def model(name: str) -> ModelFile:
    return replace(MODEL, build_optimizer=OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_replica_is_bitwise(name: str) -> None:
    model_file = model(name)
    plain = None
    for ranks, offload_state, options in (
        (1, False, PlanOptions(deadline_seconds=20)),
        (2, True, PlanOptions(deadline_seconds=20, check_finite=True)),
        (2, False, PlanOptions(deadline_seconds=20, clip_norm=1e9)),
    ):
        plan = plan_of(
            MODEL,
            STAGES,
            num_pipeline_ranks=ranks,
            offload_state=offload_state,
            options=options,
        )
        plain = plain or train_plainly(model_file, plan)
        mine = train_by_plan(model_file, plan)
        for key, value in plain.state.items():
            assert torch.equal(mine.state[key], value), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_replicas_are_close(name: str) -> None:
    assert_close(name, partition=3)


@pytest.mark.parametrize("partition", [1, 2])
def test_groups_on_every_kind_of_part(partition: int) -> None:
    assert_close("groups", partition)


@pytest.mark.slow
@pytest.mark.parametrize("partition", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_on_every_kind_of_part(name: str, partition: int) -> None:
    assert_close(name, partition)


def assert_close(name: str, partition: int) -> None:
    """Two replicas against plain training over the micro-batches of both."""
    plan = plan_of(MODEL, STAGES, num_replicas=2, partition=partition, offload_state=partition > 1)
    plain, mine = train_plainly(model(name), plan), train_by_plan(model(name), plan)
    keys = sorted(plain.state)
    assert keys == sorted(mine.state)
    joined = (torch.cat([run.state[key].reshape(-1) for key in keys]) for run in (mine, plain))
    assert relative_rms(*joined) <= TOLERANCE
