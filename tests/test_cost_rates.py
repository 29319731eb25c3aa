"""The roofline by class of operators: sizes, launches, and the file form of rates."""

import dataclasses
from itertools import pairwise

import pytest

from planner.cluster.files import validate
from planner.cluster.library import device_profile
from planner.cluster.schema import ClassRates, DeviceSpec
from planner.cluster.types import Device, OperatorRates
from planner.cost import kernel_seconds, kernels_seconds, layer_seconds
from planner.errors import ClusterError
from planner.profile import LayerProfile, OperatorClass, OperatorCount

RATES = OperatorRates(compute_efficiency=0.5, memory_efficiency=0.25, half_flop=1e6, half_bytes=1e4)
DEVICE = Device(
    name="toy",
    memory_bytes=10**9,
    peak_flops={"float32": 1e12},
    memory_bandwidth=1e11,
    kernel_overhead_seconds=1e-9,
    compute_efficiency=0.8,
    memory_efficiency=0.8,
    reserved_bytes=0,
    provenance="made up",
    rates={OperatorClass.PRODUCT: RATES},
)


def count(
    flop: int, moved_bytes: int, number: int = 1, kind: OperatorClass = OperatorClass.PRODUCT
) -> OperatorCount:
    return OperatorCount(
        flop=flop, moved_bytes=moved_bytes, dtype="float32", num_kernels=number, kind=kind
    )


def test_a_kernel_of_half_flop_reaches_half_of_the_rate() -> None:
    assert kernel_seconds(count(10**6, 0), DEVICE) == pytest.approx(10**6 / 0.25e12)
    assert kernel_seconds(count(0, 10**4), DEVICE) == pytest.approx(10**4 / 0.125e11)
    huge = kernel_seconds(count(10**13, 0), DEVICE)
    assert huge == pytest.approx(10**13 / 0.5e12, rel=1e-6)


def test_other_classes_keep_the_devices_efficiencies() -> None:
    for kind in set(OperatorClass) - {OperatorClass.PRODUCT}:
        assert kernel_seconds(count(10**6, 0, kind=kind), DEVICE) == pytest.approx(1e6 / 0.8e12)
        assert kernel_seconds(count(0, 10**6, kind=kind), DEVICE) == pytest.approx(1e6 / 0.8e11)
    plain = DEVICE.operator_rates(OperatorClass.ATTENTION)
    assert (plain.compute_efficiency, plain.half_flop) == (0.8, 0.0)


@pytest.mark.parametrize("kind", OperatorClass)
def test_time_grows_with_size_from_one(kind: OperatorClass) -> None:
    sizes = [1, 2, 10**3, 10**5, 10**7, 10**9]
    for make in (lambda n: count(n, 1, kind=kind), lambda n: count(0, n, kind=kind)):
        seconds = [kernel_seconds(make(size), DEVICE) for size in sizes]
        assert all(second >= DEVICE.kernel_overhead_seconds for second in seconds)
        assert seconds == sorted(seconds)
        assert seconds[0] < seconds[-1]
        rates = [size / second for size, second in zip(sizes, seconds, strict=True)]
        assert all(low <= high * (1 + 1e-12) for low, high in pairwise(rates))


def test_a_layer_waits_for_the_host_where_launches_take_longer() -> None:
    device = dataclasses.replace(DEVICE, launch_seconds=1e-3)
    small, large = count(1, 1, 5), count(10**11, 1, 5)
    assert kernels_seconds([small], device) == pytest.approx(5e-3)
    assert kernels_seconds([small], device, waiting_seconds=1e-3) == pytest.approx(6e-3)
    assert kernels_seconds([large], device) == kernels_seconds([large], DEVICE)
    with_collective = kernels_seconds([large], device, collective_seconds=1.0)
    assert with_collective == pytest.approx(1.0 + kernels_seconds([large], DEVICE))
    assert kernels_seconds([], device) == 0


def test_a_layer_takes_the_longer_of_both_in_each_direction() -> None:
    device = dataclasses.replace(DEVICE, launch_seconds=1e-3)
    layer = LayerProfile(
        name="layer",
        forward=(count(1, 1, 3),),
        backward=(count(10**12, 1, 1),),
        parameter_bytes=0,
        saved_bytes=0,
        saved_tensors=(),
        forward_transient_bytes=0,
        backward_transient_bytes=0,
    )
    forward, backward = layer_seconds(layer, device)
    assert forward == pytest.approx(3e-3)
    assert backward == pytest.approx(2.0, rel=1e-3)


def test_rates_of_a_file_become_the_devices() -> None:
    text = """
    name: mine
    memory_bytes: 1e9
    peak_flops: {float32: 1e12}
    memory_bandwidth: 1e11
    reserved_bytes: 0
    launch_seconds: {value: 2e-5, source: a stopwatch}
    rates:
      product:
        compute_efficiency: {value: 0.5, source: a ruler}
        memory_efficiency: 0.25
        half_flop: 1e6
    """
    spec = validate(DeviceSpec, text, "mine.yaml")
    device = spec.to_device("mine.yaml")
    expected = dataclasses.replace(RATES, half_bytes=0.0)
    assert dict(device.rates) == {OperatorClass.PRODUCT: expected}
    assert device.launch_seconds == 2e-5
    assert "launch from a stopwatch" in device.provenance
    assert "product compute from a ruler" in device.provenance
    again = DeviceSpec.model_validate(spec.model_dump(mode="json", exclude_defaults=True))
    assert again.to_device("mine.yaml") == device
    for bad in ("efficiency: 1.5", "half_flop: -1", "flops: 3"):
        with pytest.raises(ClusterError):
            validate(DeviceSpec, f"{text}    {bad}\n", "mine.yaml")


def test_the_schema_knows_every_class() -> None:
    assert set(ClassRates.model_fields) == {kind.value for kind in OperatorClass}


def test_packaged_devices_launch_for_nothing_unless_they_say_so() -> None:
    assert device_profile("h100-sxm").device.to_device("").launch_seconds == 0
