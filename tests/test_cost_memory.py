"""Memory formulas against hand calculation."""

import dataclasses

import pytest

from planner.cost import (
    StageBytes,
    gather_buffer_bytes,
    gradient_buffer_bytes,
    rank_bytes,
    state_bytes,
    stored_bytes,
    working_bytes,
)

SMALL = StageBytes(
    weight_bytes=100,
    gradient_bytes=80,
    input_bytes=7,
    saved_bytes=50,
    transient_bytes=20,
    recompute=True,
)
LARGE = dataclasses.replace(
    SMALL, weight_bytes=301, gradient_bytes=301, saved_bytes=40, transient_bytes=90, recompute=False
)


@pytest.mark.parametrize(
    ("partition", "num_replicas", "expected"),
    [(0, 1, 3 * 401), (0, 4, 3 * 401), (3, 1, 3 * 401), (3, 4, 3 * (25 + 76)), (3, 1000, 6)],
)
def test_state(partition: int, num_replicas: int, expected: int) -> None:
    found = state_bytes(
        [100, 301], optimizer_slots=2, partition=partition, num_replicas=num_replicas
    )
    assert found == expected


def test_state_without_slots_is_the_weights() -> None:
    assert state_bytes([100], optimizer_slots=0, partition=0, num_replicas=8) == 100
    assert state_bytes([], optimizer_slots=2, partition=3, num_replicas=8) == 0


def test_gather_buffers_are_as_large_as_the_largest_stage() -> None:
    assert gather_buffer_bytes([100, 301], num_weight_buffers=2, partition=3) == 602
    assert gather_buffer_bytes([100, 301], num_weight_buffers=1, partition=3) == 301
    assert gather_buffer_bytes([100, 301], num_weight_buffers=2, partition=0) == 0
    assert gather_buffer_bytes([], num_weight_buffers=2, partition=3) == 0


@pytest.mark.parametrize(
    ("partition", "num_replicas", "expected"), [(0, 4, 602), (3, 4, 602 + 76), (3, 1, 602 + 301)]
)
def test_gradient_buffers(partition: int, num_replicas: int, expected: int) -> None:
    found = gradient_buffer_bytes(
        [80, 301], num_gradient_buffers=2, partition=partition, num_replicas=num_replicas
    )
    assert found == expected


@pytest.mark.parametrize("num_micro_batches", [1, 8])
def test_stored_inputs_grow_with_micro_batches(num_micro_batches: int) -> None:
    found = stored_bytes([SMALL, LARGE], num_micro_batches=num_micro_batches)
    assert found == num_micro_batches * (7 + 40)


def test_a_recomputed_stage_works_with_what_it_saves() -> None:
    assert working_bytes([SMALL]) == 70
    assert working_bytes([SMALL, LARGE]) == 90
    assert working_bytes([dataclasses.replace(LARGE, recompute=True)]) == 130
    assert working_bytes([]) == 0


def test_a_rank_adds_its_classes() -> None:
    found = rank_bytes(
        [SMALL, LARGE],
        num_micro_batches=8,
        num_replicas=4,
        partition=3,
        optimizer_slots=2,
        num_weight_buffers=2,
        num_gradient_buffers=2,
    )
    assert (found.state, found.gather_buffers) == (303, 602)
    assert (found.gradient_buffers, found.stored, found.working) == (678, 376, 90)
    assert found.total == 303 + 602 + 678 + 376 + 90


def test_a_partitioned_trillion_parameter_rank_is_about_six_gigabytes() -> None:
    """The layered, modular and partitioned row of the trillion-parameter model, our calculation:
    160 layers of 12 x 25 600^2 parameters, 483 replicas, 5 pipeline ranks, 16-way tensor parallel,
    half precision in buffers, three buffers in all, five micro-batches of one sequence of 2 560.
    """
    parameters = 12 * 25_600**2 // 16
    inputs = 2 * 2_560 * 25_600 // 16
    stage = StageBytes(
        weight_bytes=2 * parameters,
        gradient_bytes=2 * parameters,
        input_bytes=inputs,
        saved_bytes=0,
        transient_bytes=0,
        recompute=True,
    )
    found = rank_bytes(
        [stage] * 32,
        num_micro_batches=5,
        num_replicas=483,
        partition=3,
        optimizer_slots=5,  # 12 bytes per parameter, in units of 2
        num_weight_buffers=2,
        num_gradient_buffers=1,
    )
    assert found.state == pytest.approx(0.39e9, rel=0.01)
    assert found.gather_buffers + found.gradient_buffers == pytest.approx(2.95e9, rel=0.01)
    assert found.stored == pytest.approx(1.31e9, rel=0.01)
