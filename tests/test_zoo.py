"""Every model of the zoo: traced, cut into four stages on four ranks, trained, and compared.

Losses, gradients, parameters and buffers are those of the eager module in one process over the
same micro-batches, bit by bit. Only where a tied weight lies on two ranks are its gradient's parts
added in another order.
"""

import functools

import pytest
from planned import assert_same, plan_of, traced
from zoo import PATHS

from planner.model_file import ModelFile, load_model_file
from planner.plan.types import Plan

NUM_STAGES = 4


@functools.cache
def model_file(name: str) -> ModelFile:
    return load_model_file(str(PATHS[name]))


def four_stages(name: str, *, recompute: bool) -> Plan:
    """Four stages of about equally many layers, one on each of four ranks."""
    num_layers = len(traced(model_file(name)).layer_graph(2).layers)
    assert num_layers >= NUM_STAGES
    return plan_of(
        model_file(name),
        tuple(round(stage * num_layers / NUM_STAGES) for stage in range(NUM_STAGES + 1)),
        num_pipeline_ranks=NUM_STAGES,
        num_micro_batches=2,
        recompute=recompute,
    )


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", PATHS)
def test_four_stages_train_as_the_eager_module_does(name: str, recompute: bool) -> None:
    plan = four_stages(name, recompute=recompute)
    is_tied = any(len(unit.ranks) > 1 for unit in plan.units)
    assert_same(model_file(name), plan, 1e-6 if is_tied else 0.0)
