"""Profiles divided by T: exact shares, refusals, and the seconds of all-reduces by hand."""

from dataclasses import replace

import pytest

from planner.cluster.types import Device, Link
from planner.cost import (
    all_reduce_seconds,
    layer_seconds,
    split_layer_seconds,
    split_profile,
    tensor_seconds,
)
from planner.errors import UsageError
from planner.profile import LayerProfile, LayerSplit, OperatorClass, OperatorCount, Profile

LINK = Link(name="link", bandwidth=1e9, latency_seconds=1e-6)
DEVICE = Device(
    name="round",
    memory_bytes=10**9,
    peak_flops={"float32": 1e12},
    memory_bandwidth=1e12,
    kernel_overhead_seconds=0.0,
    compute_efficiency=1.0,
    memory_efficiency=1.0,
    reserved_bytes=0,
    provenance="made up",
)


def kernels(flop: int, moved_bytes: int, split: bool) -> OperatorCount:
    return OperatorCount(
        flop=flop,
        moved_bytes=moved_bytes,
        dtype="float32",
        num_kernels=3,
        kind=OperatorClass.PRODUCT,
        split=split,
    )


LAYER = LayerProfile(
    name="block",
    forward=(kernels(8_000_000, 100, True), kernels(1_000_000, 50, False)),
    backward=(kernels(16_000_000, 200, True),),
    parameter_bytes=1000,
    saved_bytes=800,
    saved_tensors=(),
    forward_transient_bytes=600,
    backward_transient_bytes=1000,
    forward_all_reduce_bytes=(4000, 4000),
    backward_all_reduce_bytes=(4000,),
    split=LayerSplit(
        parameters=("weight",),
        parameter_bytes=900,
        tensors=(),
        saved_share=0.75,
        forward_peaks=((0.5, 0.5), (0.25, 0.75)),
        backward_peaks=((0.0, 1.0), (0.6, 0.1)),
        pieces=8,
    ),
)
PROFILE = Profile(micro_batch_size=1, layers=(LAYER,))


def test_degree_1_changes_nothing() -> None:
    assert split_profile(PROFILE, 1) is PROFILE
    assert tensor_seconds(LAYER, 1, LINK) == (0.0, 0.0)
    assert split_layer_seconds(LAYER, 1, DEVICE, LINK) == layer_seconds(LAYER, DEVICE)
    unknown = replace(PROFILE, layers=(replace(LAYER, split=None),))
    assert split_profile(unknown, 1) is unknown


def test_degree_2_halves_what_is_split() -> None:
    found = split_profile(PROFILE, 2).layers[0]
    assert found.forward_flop == 3 * (4_000_000 + 1_000_000)
    assert found.backward_flop == LAYER.backward_flop // 2
    assert found.forward[0].moved_bytes == 50
    assert found.forward[1] == LAYER.forward[1]
    assert found.parameter_bytes == 100 + 450
    assert found.saved_bytes == 200 + 300
    # The worst moment is another one than that of the whole layer.
    assert found.forward_transient_bytes == 600 * (0.5 + 0.25)
    assert found.backward_transient_bytes == 1000 * 0.65


def test_what_is_not_divisible_is_rounded_up() -> None:
    odd = replace(LAYER, forward=(kernels(7, 9, True),), split=replace(LAYER.split, pieces=0))
    found = split_profile(replace(PROFILE, layers=(odd,)), 4).layers[0]
    assert (found.forward[0].flop, found.forward[0].moved_bytes) == (2, 3)


def test_heads_that_the_degree_does_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"degree 3 .* 8 pieces .*'block'") as caught:
        split_profile(PROFILE, 3)
    assert "1, 2, 4, 8" in caught.value.hint


def test_a_profile_without_splits_is_refused() -> None:
    with pytest.raises(UsageError, match="does not say what tensor parallelism of degree 2"):
        split_profile(replace(PROFILE, layers=(replace(LAYER, split=None),)), 2)
    with pytest.raises(UsageError, match="the tensor degree is 0"):
        split_profile(PROFILE, 0)


def test_seconds_are_those_of_the_parts_and_of_the_all_reduces() -> None:
    one = 2 * (3e-6 + 3 / 4 * 4000 / 1e9)  # ring of 4: reduce-scatter, then all-gather
    assert all_reduce_seconds(4000, 4, LINK) == pytest.approx(one)
    assert tensor_seconds(LAYER, 4, LINK) == pytest.approx((2 * one, one))
    forward, backward = split_layer_seconds(LAYER, 4, DEVICE, LINK)
    assert forward == pytest.approx(3 * (2e-6 + 1e-6) + 2 * one)
    assert backward == pytest.approx(3 * 4e-6 + one)


def test_measured_seconds_are_scaled_as_the_kernels_are() -> None:
    measured = replace(LAYER, forward_seconds=1.0, backward_seconds=4.0)
    reduces = tensor_seconds(LAYER, 2, LINK)
    forward, backward = split_layer_seconds(measured, 2, DEVICE, LINK)
    assert forward == pytest.approx(5 / 9 + reduces[0])
    assert backward == pytest.approx(2.0 + reduces[1])
    assert split_layer_seconds(measured, 1, DEVICE, LINK) == (1.0, 4.0)
