"""The whole table of ways to train, crossed: what a plan leaves is what plain lines of torch leave.

Precision, optimizer, what ends a step, where state and inputs live, partition and schedule. One
replica is bitwise. Exceptions: where a norm scales the gradients it is summed up in another order
than torch's, and several replicas add gradients in another order; both agree to 1e-6 in float32,
and as far as the type goes in half precision.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from half import assert_same, options_of
from planned import plan_of
from test_parity_optimizers import MODEL, STAGES, Build

from planner.model_file import ModelFile
from planner.precision import Precision
from planner.schedules import Schedule

PRECISIONS = (Precision.MODEL, Precision.BFLOAT16, Precision.FLOAT16)
OPTIMIZERS: dict[str, Build] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "Adam fused": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
}
ENDS: dict[str, dict[str, Any]] = {
    "in backward": {},
    "finite": {"check_finite": True},
    "never clipped": {"clip_norm": 1e9},
    "clipped": {"clip_norm": 0.05},
    "clipped later": {"clip_norm": 0.05, "clip_delayed": True},
}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": True, "schedule": Schedule.PLAIN},
    {"offload_state": True},
    {"offload_state": True, "offload_inputs": True, "recompute": True},
    {"num_pipeline_ranks": 2, "offload_state": True},
    {"num_pipeline_ranks": 2, "schedule": Schedule.INTERLEAVED, "num_micro_batches": 2},
    {"num_pipeline_ranks": 4, "schedule": Schedule.ZERO_BUBBLE},
)
REPLICATED = tuple(
    {"num_replicas": 2, "partition": level, "num_pipeline_ranks": ranks, "offload_state": offload}
    for level in range(4)
    for ranks in (1, 2)
    for offload in (False, True)
)
SCALES = ("clipped", "clipped later")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained_by(build: Build) -> ModelFile:
    return replace(MODEL, build_optimizer=build)


def goes_together(precision: Precision, end: str) -> bool:
    """float16 checks every step, and what is checked is not clipped by an older norm."""
    return not (precision is Precision.FLOAT16 and end == "clipped later")


def tolerance_of(precision: Precision) -> float:
    return {Precision.MODEL: 1e-6, Precision.BFLOAT16: 1e-2, Precision.FLOAT16: 1e-3}[precision]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_replica(precision: Precision, optimizer: str, end: str) -> None:
    if not goes_together(precision, end):
        pytest.skip("float16 checks every step")
    model_file, options = trained_by(OPTIMIZERS[optimizer]), options_of(precision, **ENDS[end])
    tolerance = 1e-6 if end in SCALES else 0.0
    for layout in LAYOUTS:
        plan = plan_of(model_file, STAGES, options=options, **layout)
        assert_same(model_file, plan, tolerance=tolerance)


@pytest.mark.parametrize("layout", REPLICATED, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_replicas(precision: Precision, layout: dict[str, Any]) -> None:
    model_file = trained_by(OPTIMIZERS["AdamW"])
    for end, words in ENDS.items():
        if goes_together(precision, end):
            options = options_of(precision, **words)
            plan = plan_of(model_file, STAGES, options=options, **layout)
            assert_same(model_file, plan, tolerance=tolerance_of(precision))
