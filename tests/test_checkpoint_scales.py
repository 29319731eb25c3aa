"""Checkpoints of mixed precision and of delayed clipping: masters, and the scales of both."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from half import HALF, options_of
from planned import Chain, model_of, plan_of
from stepping import batches, on_every_rank, whole_state
from torch import Tensor, nn

from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision
from runtime.executor import Executor
from runtime.loss_scale import LossScale

MODEL = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
DELAYED = PlanOptions(deadline_seconds=20, clip_norm=1e-2, clip_delayed=True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"boundaries": (0, 5)},
    "two ranks": {"boundaries": (0, 1, 3, 4, 5), "num_pipeline_ranks": 2, "recompute": True},
    "offloaded": {"boundaries": (0, 2, 5), "offload_state": True},
    "partition 0": {"boundaries": (0, 2, 5), "num_replicas": 2, "partition": 0},
    "partition 1": {"boundaries": (0, 2, 5), "num_replicas": 2, "partition": 1},
    "partition 3": {"boundaries": (0, 1, 5), "num_replicas": 2, "num_pipeline_ranks": 2},
}
OPTIONS = {
    **{str(precision.value): options_of(precision) for precision in HALF},
    "delayed": DELAYED,
}
SAVED, LAST = 2, 4


def plan(layout: str, options: PlanOptions) -> Plan:
    return plan_of(MODEL, options=options, **LAYOUTS[layout])


@cache
def given(num_replicas: int) -> list[list[dict[str, Tensor]]]:
    """Of each step, a batch for each replica. Drawn before the ranks' threads start."""
    made = plan("partition 0" if num_replicas > 1 else "one process", DELAYED)
    return [batches(made, MODEL, step) for step in range(LAST)]


def batch_of(executor: Executor, step: int) -> dict[str, Tensor]:
    return given(executor.plan.num_replicas)[step][executor.replica]


def trained(first: int, last: int, executor: Executor) -> None:
    for step in range(first, last):
        executor.step(batch_of(executor, step))


def state_after(made: Plan, function: Any) -> dict[str, Tensor]:
    """What `function` of every rank's executor leaves."""
    given(made.num_replicas)

    def run(executor: Executor) -> dict[str, Tensor]:
        function(executor)
        return executor.state_dict()

    return whole_state(made, on_every_rank(made, MODEL, run))


@pytest.mark.parametrize(
    ("first", "second"),
    [("one process", "two ranks"), ("two ranks", "offloaded"), ("offloaded", "one process")],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_another_plan_goes_on_bit_for_bit(
    name: str, first: str, second: str, tmp_path: Path
) -> None:
    one, other = plan(first, OPTIONS[name]), plan(second, OPTIONS[name])
    whole = state_after(one, partial(trained, 0, LAST))

    def begin(executor: Executor) -> None:
        trained(0, SAVED, executor)
        executor.save(tmp_path / "half")

    def go_on(executor: Executor) -> None:
        executor.load(tmp_path / "half")
        trained(SAVED, LAST, executor)

    state_after(one, begin)
    found = state_after(other, go_on)
    for key, value in whole.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("second", [name for name in LAYOUTS if name.startswith("partition")])
@pytest.mark.parametrize("first", [name for name in LAYOUTS if name.startswith("partition")])
def test_masters_are_the_same_in_every_layout(first: str, second: str, tmp_path: Path) -> None:
    options = options_of(Precision.FLOAT16)
    one, other = plan(first, options), plan(second, options)
    scales = list[LossScale | None]()

    def begin(executor: Executor) -> None:
        trained(0, SAVED, executor)
        executor.save(tmp_path / "half")
        scales.append(executor.loss_scale)

    losses: dict[bool, list[Tensor]] = {}

    def go_on(executor: Executor) -> None:
        executor.load(tmp_path / "half")
        assert executor.loss_scale in scales
        result = executor.evaluate(batch_of(executor, SAVED))
        if result.losses and executor.replica == 0:
            losses[True] = list(result.losses)

    saved, found = state_after(one, begin), state_after(other, go_on)
    for key, value in saved.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], value), key

    def compare(executor: Executor) -> None:
        """The copies to compute with are those of the masters."""
        executor.load_state_dict(saved)
        result = executor.evaluate(batch_of(executor, SAVED))
        if result.losses and executor.replica == 0:
            losses[False] = list(result.losses)

    state_after(other, compare)
    assert all(torch.equal(a, b) for a, b in zip(losses[True], losses[False], strict=True))
