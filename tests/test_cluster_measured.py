"""From measured seconds to the figures of links and hosts, and to the file that holds them."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.cluster import resolve_cluster
from planner.cluster.files import validate
from planner.cluster.fit import fit_affine
from planner.cluster.measured import (
    FoundHost,
    assemble,
    cluster_text,
    device_spec,
    link_figures,
)
from planner.cluster.samples import MeasuredSpec, SampleSpec
from planner.cluster.schema import ClusterFile, DeviceSpec, LinkSpec
from planner.cluster.types import Device, Link, OperatorRates
from planner.cost import gather_seconds, reduce_scatter_seconds
from planner.cost.algorithm import MeasuredCollective, nearest_algorithm, with_algorithm
from planner.profile import OperatorClass
from runtime.probe import message_sizes, spread_of
from runtime.survey import collective_layouts, pairs_to_time


def sample(operation: str, num_bytes: int, seconds: float, **other: object) -> SampleSpec:
    given = {"operation": operation, "where": "inside", "ranks": 2, "bytes": num_bytes}
    return SampleSpec.model_validate({**given, "seconds": seconds, **other})


def law_samples(latency: float, bandwidth: float, **other: object) -> list[SampleSpec]:
    sizes = (4, 4096, 2**20, 2**24)
    return [sample("send", size, latency + size / bandwidth, **other) for size in sizes]


def measured(samples: list[SampleSpec]) -> MeasuredSpec:
    return MeasuredSpec(date="2026-01-02", command="by hand", versions={}, samples=samples)


def host(num_devices: int, *, peak: float = 1e11, memory: float = 8e9) -> FoundHost:
    device = DeviceSpec.model_validate(
        {
            "name": "board",
            "memory_bytes": memory,
            "peak_flops": {"float32": {"value": peak, "source": "by hand"}},
            "memory_bandwidth": 1e10,
            "reserved_bytes": 0,
            "message_seconds": 1e-5,
            "synchronous": True,
            "random_bandwidth": 1e9,
        }
    )
    return FoundHost(
        device=device, num_devices=num_devices, usual_link="loopback", usual_network="loopback"
    )


@pytest.mark.parametrize(("latency", "bandwidth"), [(1e-5, 1e9), (0.0, 5e10), (3e-3, 1e6)])
def test_an_exact_law_is_found_again(latency: float, bandwidth: float) -> None:
    sizes = (4, 4096, 2**20, 2**24)
    law = fit_affine({size: latency + size / bandwidth for size in sizes})
    assert law.latency_seconds == pytest.approx(latency, abs=1e-12)
    assert law.bandwidth == pytest.approx(bandwidth)
    assert law.residual == pytest.approx(0.0, abs=1e-9)
    assert law.seconds(10**6) == pytest.approx(latency + 1e6 / bandwidth)


def test_small_messages_count_as_much_as_large_ones() -> None:
    points = {4: 1e-5, 2**20: 1e-3, 2**24: 2.4e-2}
    law = fit_affine(points)
    assert law.latency_seconds == pytest.approx(1e-5, rel=0.01)  # least squares of seconds: < 0
    errors = [max(law.seconds(n) / t, t / law.seconds(n)) for n, t in points.items()]
    assert 1 + law.residual == pytest.approx((errors[0] * errors[1] * errors[2]) ** (1 / 3))
    assert 0.1 < law.residual < 0.3


def test_a_burst_and_noise_do_not_bend_the_law() -> None:
    """As measured over a link shaped to 200 Mbit/s, which lets 128 kB through at once."""
    points = {
        4: 866e-6,
        2**12: 1.72e-3,
        2**15: 341e-6,
        2**18: 9.99e-3,
        2**21: 86.7e-3,
        2**24: 0.701,
    }
    law = fit_affine(points)
    assert law.bandwidth == pytest.approx(23.9e6, rel=0.05)
    assert law.latency_seconds == pytest.approx(866e-6, rel=0.5)


def test_uncertain_points_count_less() -> None:
    points = {4: 2e-3, 2**10: 1e-4, 2**14: 3e-4, 2**17: 4.8e-3, 2**20: 43e-3, 2**23: 351e-3}
    spreads = {4: 3.4, 2**10: 35.0, 2**14: 12.0, 2**17: 0.7, 2**20: 0.03, 2**23: 0.01}
    assert fit_affine(points).bandwidth > 26e6  # bent by messages that took any time
    assert fit_affine(points, spreads).bandwidth == pytest.approx(23.9e6, rel=0.02)


@pytest.mark.parametrize(
    "points",
    [{4: 1e-5}, {4: 1e-5, 2**20: 1e-5}, {4: 3e-5, 2**20: 1e-5}, {2**10: 1e-6, 2**20: 1.0}],
)
def test_noise_makes_no_negative_figures(points: dict[int, float]) -> None:
    law = fit_affine(points)
    assert law.latency_seconds >= 0
    assert 0 < law.bandwidth < float("inf")


@pytest.mark.parametrize("points", [{}, {4: 0.0}])
def test_no_time_has_no_law(points: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="no law"):
        fit_affine(points)


@pytest.mark.parametrize(("slower", "duplex"), [(1.0, True), (1.3, True), (1.8, False)])
def test_two_directions_that_slow_each_other_share_the_link(slower: float, duplex: bool) -> None:
    samples = law_samples(1e-5, 1e9)
    samples.append(sample("exchange", 2**24, slower * samples[-1].seconds))
    found = link_figures(samples, "inside", "link")
    assert found is not None
    assert found.spec.duplex is duplex
    assert found.both_ways == pytest.approx(slower)
    assert found.spec.bandwidth.value == pytest.approx(1e9, rel=1e-3)
    assert link_figures(samples, "between", "network") is None


def test_a_crowded_host_has_a_slower_link_and_crowded_adapters_are_shared() -> None:
    samples = []
    for where in ("inside", "between"):
        samples += law_samples(1e-5, 1e9, where=where)
        alone = samples[-1].seconds
        samples.append(sample("exchange", 2**24, alone, where=where))
        samples.append(sample("crowd", 2**24, 2 * alone, where=where, ranks=8))
    inside = link_figures(samples, "inside", "link")
    assert inside is not None
    assert inside.spec.bandwidth.value == pytest.approx(5e8, rel=1e-3)
    file = assemble("made", "gloo", [host(4), host(4)], measured(samples))
    assert isinstance(file.network, LinkSpec)
    assert file.network.bandwidth.value == pytest.approx(1e9, rel=1e-3)
    # Four pairs at half the rate: as much as two whole ones.
    assert [h.adapter_bandwidth.value for h in file.hosts if h.adapter_bandwidth] == [
        pytest.approx(2e9, rel=1e-3)
    ] * 2


def test_hosts_alike_get_the_same_figures(tmp_path: Path) -> None:
    samples = law_samples(1e-5, 1e9) + law_samples(1e-4, 1e8, where="between")
    hosts = [host(2, peak=1e11), host(2, peak=1.2e11), host(1, peak=9e10), host(2, peak=1.1e11)]
    text = cluster_text(assemble("made", "gloo", hosts, measured(samples)))
    path = tmp_path / "made.yaml"
    path.write_text(text)
    assert validate(ClusterFile, text, "made.yaml").name == "made"
    cluster = resolve_cluster(str(path), 7)
    peaks = [h.device.peak_flops["float32"] for h in cluster.hosts]
    assert peaks == pytest.approx([1.1e11, 1.1e11, 9e10, 1.1e11])
    assert [h.num_devices for h in cluster.hosts] == [2, 2, 1, 2]
    device = cluster.device(0)
    assert (device.synchronous, device.random_bandwidth) == (True, 1e9)
    assert device.message_seconds == 1e-5
    assert cluster.network.latency_seconds == pytest.approx(1e-4, rel=1e-3)
    assert "measured on 2026-01-02" in cluster.provenance


def test_a_device_survives_its_file_form() -> None:
    rates = OperatorRates(compute_efficiency=0.7, memory_efficiency=0.6, half_flop=1e6)
    device = Device(
        name="cpu",
        memory_bytes=12_345_678_901,
        peak_flops={"float32": 7e10, "bfloat16": 3e11},
        memory_bandwidth=2e10,
        kernel_overhead_seconds=8e-6,
        compute_efficiency=0.9,
        memory_efficiency=0.8,
        reserved_bytes=3 * 10**8,
        provenance="",
        synchronous=True,
        random_bandwidth=5e8,
        message_seconds=4e-5,
        rates={OperatorClass.PRODUCT: rates},
        launch_seconds=3e-6,
    )
    found = device_spec(device, "measured", 6e-5).to_device("here")
    assert replace(found, provenance="") == replace(device, message_seconds=6e-5)
    assert "from measured" in found.provenance


def test_what_one_process_cannot_measure_is_named() -> None:
    file = assemble("made", "gloo", [host(1)], measured([]))
    assert file.hosts[0].link == file.network == "loopback"
    assert file.measured is not None
    assert [note.split(":")[0] for note in file.measured.notes] == ["link", "network"]
    assert with_algorithm(file) == file


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_the_algorithm_is_read_off_the_times(algorithm: str) -> None:
    link = Link(name="link", bandwidth=1e9, latency_seconds=1e-4)
    collectives = [
        MeasuredCollective(
            operation=operation,
            num_bytes=size,
            num_members=8,
            link=link,
            seconds=1.2 * formula(size, 8, link, algorithm),
        )
        for operation, formula in (
            ("gather", gather_seconds),
            ("reduce-scatter", reduce_scatter_seconds),
        )
        for size in (10**3, 10**4, 10**5)
    ]
    found, ratio = nearest_algorithm(collectives)
    assert found == algorithm
    assert ratio == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("sizes", "inside", "between", "layouts"),
    [
        ([1], [], [], []),
        ([2], [(0, 1)], [], [("inside", 2)]),
        ([4], [(0, 1), (1, 2), (2, 3)], [], [("inside", 4)]),
        ([1, 1], [], [(0, 1)], [("between", 2)]),
        ([2, 2], [(0, 1), (2, 3)], [(0, 2)], [("inside", 2), ("between", 4)]),
        ([4, 2], [(0, 1), (1, 2), (2, 3), (4, 5)], [(0, 4)], [("inside", 2), ("between", 6)]),
        ([2, 1], [(0, 1)], [(0, 2)], [("between", 3)]),
    ],
)
def test_which_ranks_are_measured(
    sizes: list[int],
    inside: list[tuple[int, int]],
    between: list[tuple[int, int]],
    layouts: list[tuple[str, int]],
) -> None:
    hosts, start = [], 0
    for size in sizes:
        hosts.append(range(start, start + size))
        start += size
    assert pairs_to_time(hosts) == (inside, between)
    assert collective_layouts(hosts) == layouts


def test_many_ranks_are_measured_at_a_few_places() -> None:
    inside, between = pairs_to_time([range(8 * i, 8 * i + 8) for i in range(64)])
    assert 4 <= len(inside) <= 8
    assert 4 <= len(between) <= 8
    assert all(a // 8 == b // 8 for a, b in inside)
    assert all(a // 8 < b // 8 for a, b in between)


def test_sizes_end_with_the_largest() -> None:
    assert message_sizes(2**24) == (4, 4096, 2**15, 2**18, 2**21, 2**24)
    assert message_sizes(4096) == (4, 8, 64, 512, 4096)
    assert spread_of([1.0, 1.0]) == 0.0
    assert spread_of([1.0, 2.0, 3.0]) == pytest.approx(0.5)
