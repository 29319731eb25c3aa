"""Graphs of sizes that were not traced, against those that are."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.model_file import load_model_file
from planner.trace import same_graph, trace
from planner.trace.scaled import scaled_graph

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_a_third_size_follows_from_two(name: str) -> None:
    traced = trace(load_model_file(str(EXAMPLES / f"{name}.py")))
    graph = scaled_graph(traced.layer_graph(2), traced.layer_graph(4), 6)
    assert graph is not None
    assert same_graph(graph, traced.layer_graph(6))
    assert not same_graph(graph, traced.layer_graph(4))
    assert same_graph(traced.any_graph(8), traced.layer_graph(8))


def test_graphs_that_differ_in_more_than_sizes_make_no_third() -> None:
    traced = trace(load_model_file(str(EXAMPLES / "mlp.py")))
    one, other = traced.layer_graph(2), traced.layer_graph(4)
    assert scaled_graph(one, replace(other, layers=other.layers[:-1]), 6) is None
    assert scaled_graph(one, replace(other, model_name="another"), 6) is None
    odd = replace(other, num_random_operators=other.num_random_operators + 1)
    assert scaled_graph(one, odd, 5) is None
