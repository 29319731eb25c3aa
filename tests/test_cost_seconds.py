"""Time formulas against hand calculation."""

import dataclasses
from collections.abc import Callable

import pytest

from planner.cluster.types import Device, Link
from planner.cost import (
    all_reduce_seconds,
    copy_seconds,
    gather_seconds,
    layer_seconds,
    peak_flops,
    read_seconds,
    reduce_scatter_seconds,
    transfer_seconds,
    update_seconds,
)
from planner.profile import LayerProfile, OperatorCount

DEVICE = Device(
    name="toy",
    memory_bytes=10**9,
    peak_flops={"float32": 1e12, "float16": 8e12, "float64": 0.5e12},
    memory_bandwidth=1e11,
    kernel_overhead_seconds=1e-6,
    compute_efficiency=0.5,
    memory_efficiency=0.8,
    reserved_bytes=0,
    provenance="made up",
)
LINK = Link(name="toy", bandwidth=1e9, latency_seconds=1e-5)


def kernel(flop: int, moved_bytes: int, dtype: str = "float32", num: int = 1) -> OperatorCount:
    return OperatorCount(flop=flop, moved_bytes=moved_bytes, dtype=dtype, num_kernels=num)


def layer(
    *forward: OperatorCount, backward: tuple[OperatorCount, ...] = (), **seconds: float
) -> LayerProfile:
    return LayerProfile(
        name="layer",
        forward=forward,
        backward=backward,
        parameter_bytes=0,
        saved_bytes=0,
        saved_tensors=(),
        forward_transient_bytes=0,
        backward_transient_bytes=0,
        forward_seconds=seconds.get("forward_seconds"),
        backward_seconds=seconds.get("backward_seconds"),
    )


@pytest.mark.parametrize(
    ("count", "seconds"),
    [
        (kernel(5 * 10**9, 10), 1e-2),  # 5e9 / (1e12 x 0.5): bound by compute
        (kernel(5 * 10**9, 10, "float16"), 1.25e-3),
        (kernel(10, 8 * 10**8), 1e-2),  # 8e8 / (1e11 x 0.8): bound by memory
        (kernel(0, 8 * 10**8, num=3), 3e-2),
        (kernel(1, 1), 1e-6),  # bound by the overhead
        (kernel(0, 0, num=1000), 1e-3),
        (kernel(0, 0, num=0), 0.0),
    ],
)
def test_each_kernel_takes_its_slowest_bound(count: OperatorCount, seconds: float) -> None:
    assert layer_seconds(layer(count), DEVICE) == (pytest.approx(seconds), 0.0)


def test_kernels_add_up_and_do_not_overlap() -> None:
    compute, memory = kernel(5 * 10**9, 0), kernel(0, 8 * 10**8)
    both = layer(compute, memory, backward=(compute, compute, memory))
    assert layer_seconds(both, DEVICE) == (pytest.approx(2e-2), pytest.approx(3e-2))


def test_measured_seconds_win_each_for_itself() -> None:
    counts = (kernel(5 * 10**9, 0),)
    measured = layer(*counts, backward=counts, backward_seconds=7.0)
    assert layer_seconds(measured, DEVICE) == (pytest.approx(1e-2), 7.0)
    assert layer_seconds(layer(*counts, forward_seconds=0.0), DEVICE)[0] == 0.0


def test_a_layer_without_kernels_takes_no_time() -> None:
    assert layer_seconds(layer(), DEVICE) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("dtype", "flops"),
    [
        ("float32", 1e12),
        ("bfloat16", 8e12),
        ("float8_e4m3fn", 8e12),
        ("complex128", 0.5e12),
        ("complex64", 1e12),
        ("int64", 1e12),
        ("bool", 1e12),
    ],
)
def test_absent_dtypes_take_the_rate_of_their_stand_in(dtype: str, flops: float) -> None:
    assert peak_flops(DEVICE, dtype) == flops


def test_without_float32_the_lowest_rate_stands_in() -> None:
    device = dataclasses.replace(DEVICE, peak_flops={"bfloat16": 3.0, "float64": 2.0})
    assert peak_flops(device, "int8") == 2.0
    assert peak_flops(device, "float16") == 3.0


def test_transfer() -> None:
    assert transfer_seconds(10**9, LINK) == pytest.approx(1 + 1e-5)
    assert transfer_seconds(0, LINK) == 1e-5


@pytest.mark.parametrize("cost", [gather_seconds, reduce_scatter_seconds, all_reduce_seconds])
def test_one_replica_moves_nothing(cost: Callable[[int, int, Link], float]) -> None:
    assert cost(10**9, 1, LINK) == 0.0


@pytest.mark.parametrize("num_replicas", [2, 3, 8, 483])
def test_ring_formulas(num_replicas: int) -> None:
    num_bytes = 12 * 10**9
    expected = (num_replicas - 1) / num_replicas * num_bytes / 1e9 + (num_replicas - 1) * 1e-5
    assert gather_seconds(num_bytes, num_replicas, LINK) == pytest.approx(expected)
    assert reduce_scatter_seconds(num_bytes, num_replicas, LINK) == pytest.approx(expected)
    assert all_reduce_seconds(num_bytes, num_replicas, LINK) == pytest.approx(2 * expected)


def test_update_reads_and_writes_weights_gradients_and_slots() -> None:
    # AdamW: weight, gradient, two slots; each read and written: 32 bytes per float32 element.
    assert update_seconds(10**9, DEVICE, 2) == pytest.approx(32e9 / 0.8e11)
    assert update_seconds(10**9, DEVICE, 0) == pytest.approx(16e9 / 0.8e11)
    assert update_seconds(10**9, DEVICE, 0, element_bytes=2) == pytest.approx(8e9 / 0.8e11)
    assert update_seconds(1, DEVICE, 2) == 1e-6


def test_kernels_that_draw_have_their_own_rate_where_the_device_has_one() -> None:
    drawing = dataclasses.replace(kernel(0, 8 * 10**8), draws=True)
    assert layer_seconds(layer(drawing), DEVICE)[0] == pytest.approx(1e-2)
    slow = dataclasses.replace(DEVICE, random_bandwidth=1e9)
    assert layer_seconds(layer(drawing), slow)[0] == pytest.approx(0.8)
    assert layer_seconds(layer(kernel(0, 8 * 10**8)), slow)[0] == pytest.approx(1e-2)


def test_a_synchronous_device_adds_the_overhead_of_each_kernel() -> None:
    counts = layer(kernel(5 * 10**9, 10, num=3))
    synchronous = dataclasses.replace(DEVICE, synchronous=True, kernel_overhead_seconds=1e-3)
    assert layer_seconds(counts, synchronous)[0] == pytest.approx(3 * (1e-2 + 1e-3))
    asynchronous = dataclasses.replace(synchronous, synchronous=False)
    assert layer_seconds(counts, asynchronous)[0] == pytest.approx(3e-2)


def test_copies_and_reads_are_bound_by_memory() -> None:
    # 1e11 x 0.8 bytes/s; a kernel takes a microsecond at least, none at all nothing.
    assert read_seconds(8 * 10**9, DEVICE) == pytest.approx(0.1)
    assert copy_seconds(8 * 10**9, DEVICE) == pytest.approx(0.2)
    assert read_seconds(1, DEVICE) == copy_seconds(1, DEVICE) == 1e-6
    assert read_seconds(0, DEVICE) == copy_seconds(0, DEVICE) == 0.0
