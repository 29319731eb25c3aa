"""Weights tied between stages: bitwise where they share a rank, within 1e-6 over two ranks."""

import pytest
from planned import assert_same, plan_of, traced
from test_zoo import model_file


@pytest.mark.parametrize("num_pipeline_ranks", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5"])
def test_tied_weights(name: str, num_pipeline_ranks: int) -> None:
    model = model_file(name)
    num_layers = len(traced(model).layer_graph(2).layers)
    plan = plan_of(
        model,
        tuple(round(stage * num_layers / 4) for stage in range(5)),
        num_pipeline_ranks=num_pipeline_ranks,
        num_micro_batches=2,
    )
    assert traced(model).layer_graph(2).tied_parameters
    is_on_two_ranks = any(len(unit.ranks) > 1 for unit in plan.units)
    assert is_on_two_ranks == (num_pipeline_ranks == 2)
    assert_same(model, plan, 1e-6 if is_on_two_ranks else 0.0)
