"""Peak memory, byte by byte, on plans small enough to count by hand."""

from dataclasses import replace

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.lower import lower
from planner.plan.types import Plan, PlanOptions
from planner.simulate import MemoryByClass, simulate


def chain_plan(
    num_stages: int,
    num_pipeline_ranks: int,
    num_micro_batches: int,
    *,
    saved_bytes: int = 0,
    transient_bytes: int = 0,
    width: int = 1,
    num_elements: int = 10,
    **placement: int,
) -> Plan:
    graph = chain_graph(num_stages, width=width, num_elements=num_elements)
    placed = chain_placement(num_stages, num_pipeline_ranks, num_micro_batches, **placement)
    profile = chain_profile(graph, saved_bytes=saved_bytes, transient_bytes=transient_bytes)
    return lower(graph, profile, chain_cluster(placed.world_size), placed, PlanOptions())


def test_one_of_everything() -> None:
    (moment,) = simulate(chain_plan(1, 1, 1, saved_bytes=100)).memory
    # 10 floats of weights, their gradient and 2 optimizer slots; x and the loss, a float each.
    assert moment == MemoryByClass(
        weights=40, gradients=40, optimizer=80, stored_inputs=8, activations=100
    )
    assert moment.total_bytes == 268


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_partitioned_state_is_divided_and_rounded_up(num_replicas: int) -> None:
    plan = chain_plan(4, 1, 1, num_replicas=num_replicas, partition=3)
    (moment,) = simulate(plan).memory
    shard_bytes = 4 * -(-10 // num_replicas)
    assert moment.weights == 4 * shard_bytes
    assert moment.optimizer == 2 * 4 * shard_bytes
    assert moment.buffers == 2 * 40
    assert moment.gradients >= 2 * 40


def test_buffers_are_as_large_as_the_largest_unit_of_their_pool() -> None:
    plan = chain_plan(2, 1, 1, num_replicas=2, partition=3)
    large = replace(plan.units[1], num_elements=1000)
    (moment,) = simulate(replace(plan, units=(plan.units[0], large))).memory
    assert moment.buffers == 2 * 4000


def test_saved_activations_of_all_micro_batches_are_alive_at_once() -> None:
    for moment in simulate(chain_plan(8, 4, 3, saved_bytes=1000)).memory:
        assert moment.activations == 2 * 3 * 1000


def test_recompute_keeps_inputs_and_one_micro_batch_of_activations() -> None:
    plan = chain_plan(8, 4, 3, saved_bytes=1000, width=25, recompute=True)
    for rank, moment in enumerate(simulate(plan).memory):
        assert moment.activations in (0, 1000)
        # Inputs of two stages and three micro-batches, 100 bytes each; stage 0 has x instead.
        assert moment.stored_inputs >= (2 if rank else 1) * 3 * 100


def test_the_transient_peak_stands_on_what_is_kept() -> None:
    kept = simulate(chain_plan(1, 1, 3, saved_bytes=100)).peak_bytes[0]
    worst = simulate(chain_plan(1, 1, 3, saved_bytes=100, transient_bytes=5000)).memory[0]
    assert kept < worst.total_bytes <= kept + 5000
    assert worst.transient > 0


def test_sends_that_may_be_late_hold_their_tensors() -> None:
    """Nothing tells rank 0 that rank 1 has taken any input until gradients come back."""
    plan = chain_plan(2, 2, 4, width=25, recompute=True)
    first, _ = simulate(plan).memory
    assert first.stored_inputs >= 4 * 100


def test_frozen_units_have_no_optimizer_state() -> None:
    plan = chain_plan(2, 1, 1)
    programs = tuple(tuple(i for i in program if i.unit != "stage.0") for program in plan.programs)
    (moment,) = simulate(replace(plan, programs=programs)).memory
    assert moment.weights == 80
    assert moment.optimizer == 80
