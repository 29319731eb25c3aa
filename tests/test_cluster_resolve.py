"""From a name, a number of devices or nothing to a cluster; and the CPU measured on the spot."""

import math

import pytest
import torch

from planner.cluster import known_clusters, measure_cpu, resolve_cluster
from planner.cluster.measure import _measure_transfer
from planner.errors import ClusterError, UsageError


def test_twelve_devices_fill_one_host_and_half_of_the_next() -> None:
    cluster = resolve_cluster("a100-80", 12)
    assert [host.num_devices for host in cluster.hosts] == [8, 4]
    assert [cluster.host_index(rank) for rank in range(12)] == [0] * 8 + [1] * 4
    with pytest.raises(IndexError):
        cluster.host_index(12)
    assert cluster.link(0, 7).name == "nvlink3"
    assert cluster.link(7, 8).name == "ib-hdr-200"
    assert cluster.slowest_link((8, 11)).name == "nvlink3"
    assert cluster.slowest_link((0, 11)).name == "ib-hdr-200"


@pytest.mark.parametrize(
    ("num_devices", "sizes"), [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (16, [8, 8])]
)
def test_hosts_are_filled_in_order(num_devices: int, sizes: list[int]) -> None:
    assert [h.num_devices for h in resolve_cluster("v100-32", num_devices).hosts] == sizes


@pytest.mark.parametrize("name", known_clusters())
def test_every_known_name_resolves_to_exactly_the_devices_asked_for(name: str) -> None:
    for num_devices in (1, 5):
        cluster = resolve_cluster(name, num_devices)
        assert cluster.num_devices == num_devices
        assert cluster.name == name
        assert cluster.backend == ("gloo" if name == "cpu" else "nccl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_default_names_itself() -> None:
    cluster = resolve_cluster(None, 9)
    assert cluster.provenance == "default: no GPU found here; choose with --cluster"
    assert cluster.name == "a100-80"
    assert [host.num_devices for host in cluster.hosts] == [8, 1]
    assert cluster.network.name == "ib-hdr-200"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_gpus_of_this_machine_are_found() -> None:
    cluster = resolve_cluster(None, 1)
    assert torch.cuda.get_device_name(0) in cluster.provenance
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    device = cluster.device(0)
    assert device.memory_bytes == pytest.approx(total_bytes, rel=0.03)
    assert device.memory_bytes - device.reserved_bytes < total_bytes
    too_many = torch.cuda.device_count() + 1
    assert "GPUs found here" in resolve_cluster(None, too_many).provenance


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("A100-80", "a100-80"),
        ("h100", "h100-sxm"),
        ("A100", "a100-40 or a100-80 or a100-megatron"),
        ("rtx4090", "rtx-4090"),
        ("CPU", "cpu"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name: str, suggestion: str) -> None:
    with pytest.raises(ClusterError) as caught:
        resolve_cluster(name, 1)
    assert repr(name) in caught.value.message
    assert all(known in caught.value.message for known in known_clusters())
    assert caught.value.hint == f"did you mean {suggestion}?"


def test_a_name_unlike_any_other_gets_a_hint_too() -> None:
    with pytest.raises(ClusterError) as caught:
        resolve_cluster("zzz", 1)
    assert ".yaml" in caught.value.hint


@pytest.mark.parametrize("num_devices", [0, -3])
@pytest.mark.parametrize("name", [None, "a100-80", "cpu", "absent.yaml"])
def test_fewer_than_one_device_is_refused(name: str | None, num_devices: int) -> None:
    with pytest.raises(UsageError, match=str(num_devices)):
        resolve_cluster(name, num_devices)
    with pytest.raises(UsageError, match=str(num_devices)):
        measure_cpu(num_devices)


def test_the_cpu_measurement_gives_positive_finite_figures() -> None:
    cluster = measure_cpu(1)
    device, link = cluster.device(0), cluster.network
    figures = [
        *device.peak_flops.values(),
        device.memory_bandwidth,
        device.kernel_overhead_seconds,
        device.compute_efficiency,
        device.memory_efficiency,
        device.random_bandwidth or 0.0,
        device.message_seconds,
        link.bandwidth,
        link.latency_seconds,
        float(device.memory_bytes),
    ]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert device.peak_flops["float32"] > 1e8
    assert device.kernel_overhead_seconds < 1e-3
    assert max(device.compute_efficiency, device.memory_efficiency) <= 1
    assert (device.random_bandwidth or 0.0) < device.memory_bandwidth
    assert cluster.num_devices == 1
    assert cluster.provenance.startswith("measured here on ")


def test_a_transfer_beyond_its_deadline_is_given_up() -> None:
    assert _measure_transfer(0.05) is None
    transfer = _measure_transfer(30.0)
    assert transfer is not None
    assert transfer.link.bandwidth > 1e6
    assert transfer.message_seconds > 0


def test_processes_beyond_the_cores_share_them() -> None:
    one, many = measure_cpu(1).device(0), measure_cpu(1000).device(999)
    assert many.peak_flops["float32"] < one.peak_flops["float32"]
    assert many.memory_bandwidth < one.memory_bandwidth
    assert measure_cpu(1000).network.bandwidth < measure_cpu(1).network.bandwidth
    assert many.memory_bytes == one.memory_bytes // 1000
    assert many.kernel_overhead_seconds > one.kernel_overhead_seconds
    assert many.message_seconds > one.message_seconds


def test_the_measurement_is_made_once_and_leaves_the_threads_alone() -> None:
    num_threads = torch.get_num_threads()
    assert measure_cpu(3) == measure_cpu(3)
    assert torch.get_num_threads() == num_threads
