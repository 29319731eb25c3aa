"""Peak memory, byte by byte, on plans small enough to count by hand."""

from dataclasses import replace

import pytest
from plan_changes import find, with_buffer
from synthetic import chain_plan

from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.simulate.memory import (
    buffer_lives,
    class_of,
    host_memory,
    peak_memory,
    resident_memory,
    worst_moments,
)
from planner.simulate.types import MemoryByClass

FLOAT = 4


def total(plan: Plan, rank: int = 0) -> int:
    return peak_memory(plan)[rank].total_bytes


def test_one_of_everything() -> None:
    (moment,) = peak_memory(chain_plan(1, 1, 1, num_elements=10, saved_bytes=100))
    # 10 floats of weights, their gradient and 2 optimizer slots; x and the loss, a float each.
    assert moment == MemoryByClass(
        weights=40, gradients=40, optimizer=80, stored_inputs=8, activations=100
    )
    assert moment.total_bytes == 268


def test_the_order_may_be_given() -> None:
    plan = chain_plan(4, 2, 3, saved_bytes=10, width=3)
    assert peak_memory(plan, partial_order(plan)) == peak_memory(plan)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_partitioned_state_is_divided_and_rounded_up(num_replicas: int) -> None:
    plan = chain_plan(4, 1, 1, num_elements=10, num_replicas=num_replicas, partition=3)
    (moment,) = peak_memory(plan)
    shard_bytes = FLOAT * -(-10 // num_replicas)
    padded_bytes = shard_bytes * num_replicas
    assert moment.weights == 4 * shard_bytes
    assert moment.optimizer == 2 * 4 * shard_bytes
    assert moment.buffers == 2 * padded_bytes
    assert moment.gradients >= 2 * padded_bytes


def test_sizes_come_from_the_table() -> None:
    plan = chain_plan(2, 1, 1, num_elements=10, num_replicas=2, partition=3)
    larger = with_buffer(plan, 0, "weights:float32.0", shape=(1000,))
    assert total(larger) == total(plan) + 4000 - 40
    larger = with_buffer(plan, 0, "sum:float32.0", dtype="float64")
    assert total(larger) == total(plan) + 40


def test_weights_in_place_are_the_shard_and_count_once() -> None:
    resident = resident_memory(chain_plan(2, 1, 1, num_elements=10), 0)
    assert resident == MemoryByClass(weights=80, gradients=40, optimizer=160)


def test_saved_activations_of_all_micro_batches_are_alive_at_once() -> None:
    for moment in peak_memory(chain_plan(8, 4, 3, saved_bytes=1000)):
        assert moment.activations == 2 * 3 * 1000


def test_recompute_keeps_inputs_and_one_micro_batch_of_activations() -> None:
    plan = chain_plan(8, 4, 3, saved_bytes=1000, width=25, recompute=True)
    for rank, moment in enumerate(peak_memory(plan)):
        assert moment.activations in (0, 1000)
        # Inputs of two stages and three micro-batches, 100 bytes each; stage 0 has x instead.
        assert moment.stored_inputs >= (2 if rank else 1) * 3 * 100


def test_the_transient_peak_stands_on_what_is_kept() -> None:
    kept = total(chain_plan(1, 1, 3, saved_bytes=100))
    (worst,) = peak_memory(chain_plan(1, 1, 3, saved_bytes=100, transient_bytes=5000))
    assert kept < worst.total_bytes <= kept + 5000
    assert worst.transient > 0


@pytest.mark.parametrize("opcode", [Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT])
def test_both_halves_of_backward_have_a_transient_peak(opcode: Opcode) -> None:
    plan = chain_plan(1, 1, 1, schedule=Schedule.ZERO_BUBBLE, transient_bytes=5000)
    whole = chain_plan(1, 1, 1, schedule=Schedule.GPIPE, transient_bytes=5000)
    assert total(plan) == total(whole) >= 5000
    assert find(plan, 0, opcode) > 0


def test_sends_that_may_be_late_hold_their_tensors() -> None:
    """Nothing tells rank 0 that rank 1 has taken any input until gradients come back."""
    plan = chain_plan(2, 2, 4, width=25, recompute=True)
    first, _ = peak_memory(plan)
    assert first.stored_inputs >= 4 * 100


def test_a_send_is_over_where_its_answer_is_read() -> None:
    """With one micro-batch, F 2.0 reads what rank 1 made of h_0.0, so h_0.0 has left before."""
    plan = chain_plan(4, 2, 1, width=25, recompute=True)
    peak = replace(plan.stages[2], forward_transient_bytes=10**6)
    plan = replace(plan, stages=(*plan.stages[:2], peak, plan.stages[3]))
    moment = worst_moments(plan)[0]
    assert moment.index == find(plan, 0, Opcode.FORWARD, stage=2)
    at_issue = {"batch:x.0": 4, "h_1.0": 100, "h_2.0": 100}
    received = moment.memory.stored_inputs - sum(at_issue.values())
    assert received in (0, 100)  # gradient:h_2.0, if its RECEIVE is issued before
    # A second micro-batch's h_0.1 may still be on its way.
    plan = chain_plan(4, 2, 2, width=25, recompute=True)
    plan = replace(plan, stages=(*plan.stages[:2], peak, plan.stages[3]))
    first, second = (find(plan, 0, Opcode.FORWARD, stage=2, micro_batch=m) for m in (0, 1))
    assert worst_moments(plan)[0].index in (first, second)
    lives = buffer_lives(plan, 0)
    assert lives.begins[lives.names.index("h_0.1")] < first


def test_more_streams_less_memory_only_if_they_are_waited_for() -> None:
    """The same SENDs, but each micro-batch's gradient is back before the next goes forward."""
    layered = chain_plan(2, 2, 4, width=250, recompute=True)
    plain = chain_plan(2, 2, 4, width=250, recompute=True, schedule=Schedule.PLAIN)
    assert peak_memory(layered)[0].stored_inputs >= 4 * 1000
    assert peak_memory(plain)[0].stored_inputs <= 3 * 1000


def test_frozen_units_have_no_optimizer_state() -> None:
    plan = chain_plan(2, 1, 1, num_elements=10)
    programs = tuple(tuple(i for i in program if i.unit != "stage.0") for program in plan.programs)
    (moment,) = peak_memory(replace(plan, programs=programs))
    assert moment.weights == 80
    assert moment.optimizer == 80


def test_an_evaluation_has_the_state_beside_it() -> None:
    evaluation = chain_plan(2, 1, 2, num_elements=10, saved_bytes=1000).forward_only()
    (moment,) = peak_memory(evaluation)
    assert (moment.weights, moment.optimizer, moment.activations) == (80, 160, 0)


def test_offloaded_state_comes_and_goes() -> None:
    plan = chain_plan(8, 1, 1, num_elements=10, offload_state=True)
    kept = chain_plan(8, 1, 1, num_elements=10)
    (moment,), (all_of_it,) = peak_memory(plan.forward_only()), peak_memory(kept.forward_only())
    assert (all_of_it.weights, all_of_it.optimizer) == (8 * 40, 8 * 80)
    assert 0 < moment.weights < 8 * 40
    assert moment.optimizer == 0
    assert host_memory(plan) == (8 * 40 + 8 * 80,)
    assert host_memory(kept) == (0,)
    resident = resident_memory(plan, 0)
    assert (resident.weights, resident.optimizer) == (0, 0)


def test_offloaded_inputs_live_twice() -> None:
    plan = chain_plan(2, 1, 3, offload_inputs=True, recompute=True)
    lives = buffer_lives(plan, 0)
    evicted = [i.reads[0] for i in plan.programs[0] if i.opcode is Opcode.EVICT]
    assert evicted
    for buffer in evicted:
        rows = [row for row, name in enumerate(lives.names) if name == buffer]
        assert len(rows) == 2
        first, second = rows
        assert plan.programs[0][lives.ends[first] - 1].opcode is Opcode.RELEASE
        assert plan.programs[0][lives.begins[second]].opcode is Opcode.FETCH
    assert host_memory(plan)[0] == FLOAT * len(evicted)


def test_offload_bounds_what_can_be_on_the_device() -> None:
    """RELEASE waits for the copy, so a few buffers at most are on their way out."""
    stay = chain_plan(8, 1, 8, width=1000, recompute=True)
    leave = chain_plan(8, 1, 8, width=1000, recompute=True, offload_inputs=True)
    assert peak_memory(leave)[0].stored_inputs * 4 < peak_memory(stay)[0].stored_inputs
    sizes = {"num_elements": 1000, "num_micro_batches": 2}
    resident = peak_memory(chain_plan(8, 1, **sizes))[0]
    offloaded = peak_memory(chain_plan(8, 1, **sizes, offload_state=True))[0]
    state, held = resident.weights + resident.optimizer, offloaded.weights + offloaded.optimizer
    assert held * 2 <= state


def test_a_saved_checkpoint_is_host_memory() -> None:
    plan = chain_plan(2, 1, 1, num_elements=10, options=PlanOptions(save=True))
    one = 2 * 40 + 2 * 80
    assert host_memory(plan) == (2 * one,)  # the step's own and the one before
    assert peak_memory(plan) == peak_memory(chain_plan(2, 1, 1, num_elements=10))


def test_classes() -> None:
    names = {
        "h.0": "stored_inputs", "gradient:h.0": "stored_inputs", "batch:x.1": "stored_inputs",
        "loss.0": "stored_inputs", "saved:3.0": "activations", "part:tied.0.1": "gradients",
        "reduced:stage.0": "gradients", "finite": "gradients", "shard:stage.0": "weights",
        "moments:stage.0": "optimizer", "weights:float32.0": "buffers", "sum:a.0": "gradients",
    }  # fmt: skip
    assert {name: class_of(name) for name in names} == names


def test_an_empty_program_holds_what_is_resident() -> None:
    plan = chain_plan(2, 2, 1, num_elements=10)
    plan = replace(plan, programs=((), plan.programs[1]))
    assert peak_memory(plan)[0] == resident_memory(plan, 0)
