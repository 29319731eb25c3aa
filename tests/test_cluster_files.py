"""Users' cluster files: what they may say, and what each mistake is answered with."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.cluster import Allocator, Cluster, resolve_cluster
from planner.cluster.types import HOST_MEMORY_BANDWIDTH
from planner.errors import ClusterError

INLINE = """
name: lab
hosts:
  - count: 2
    device:
      name: board
      memory_bytes: 16e9
      reserved_bytes: {value: 1e9, source: seen in the driver's own table}
      peak_flops: {float32: 10e12, bfloat16: 40e12}
      memory_bandwidth: 500e9
    link: {name: bus, bandwidth: 8e9, latency_seconds: 5e-6}
network: {name: lan, bandwidth: 1.25e9, efficiency: 0.9, latency_seconds: 30e-6}
backend: gloo
"""


def read(tmp_path: Path, text: str, num_devices: int = 1) -> Cluster:
    path = tmp_path / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    return resolve_cluster(str(path), num_devices)


def refusal(tmp_path: Path, text: str, num_devices: int = 1) -> ClusterError:
    with pytest.raises(ClusterError) as caught:
        read(tmp_path, text, num_devices)
    assert caught.value.hint
    return caught.value


def test_inline_figures_arrive_unchanged(tmp_path: Path) -> None:
    cluster = read(tmp_path, INLINE, 2)
    device = cluster.device(1)
    assert (cluster.name, cluster.backend, cluster.num_devices) == ("lab", "gloo", 2)
    assert cluster.provenance == "read from lab.yaml"
    assert (device.memory_bytes, device.reserved_bytes) == (16 * 10**9, 10**9)
    assert device.peak_flops == {"float32": 10e12, "bfloat16": 40e12}
    assert device.memory_bandwidth == 500e9
    assert "seen in the driver's own table" in device.provenance
    assert "lab.yaml" in device.provenance
    assert (cluster.link(0, 1).bandwidth, cluster.link(0, 1).latency_seconds) == (8e9, 5e-6)
    assert cluster.network.bandwidth == pytest.approx(1.125e9)


SHARED = """
hosts:
  - count: 2
    device:
      name: board
      memory_bytes: 16e9
      reserved_bytes: 1e9
      peak_flops: {float32: 10e12}
      memory_bandwidth: 500e9
      instruction_overhead_seconds: 2e-6
      host_bandwidth: {value: 12e9, source: measured with a copy of 1 GiB}
      allocator: torch-cuda
    link: {name: bus, bandwidth: 8e9, latency_seconds: 5e-6, duplex: false}
    adapter_bandwidth: 3e9
network: {name: lan, bandwidth: 2e9, latency_seconds: 30e-6}
collectives: auto
"""


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_hosts_memory_updates_for_all_its_devices(tmp_path: Path, num_devices: int) -> None:
    given = SHARED.replace("    adapter_bandwidth: 3e9", "    memory_bandwidth: 5e10")
    for text, bandwidth in ((given, 5e10), (SHARED, HOST_MEMORY_BANDWIDTH)):
        (host,) = read(tmp_path, text, num_devices).hosts
        assert host.updater.memory_bandwidth == bandwidth / num_devices
        assert (host.updater.memory_efficiency, host.updater.update_efficiency) == (1.0, None)
    processor = replace(host, device=replace(host.device, synchronous=True))
    assert processor.updater is processor.device
    slower = replace(processor, memory_bandwidth=1e9)
    assert slower.updater.memory_bandwidth == 1e9 / num_devices
    error = refusal(tmp_path, given.replace("5e10", "0"), num_devices)
    assert "memory_bandwidth" in error.message


def test_shared_adapters_copies_issue_and_allocator_arrive_unchanged(tmp_path: Path) -> None:
    cluster = read(tmp_path, SHARED, 1)
    host, device = cluster.hosts[0], cluster.device(0)
    assert (host.num_devices, host.adapter_bandwidth, host.link.duplex) == (1, 3e9, False)
    assert (cluster.network.duplex, cluster.collectives) == (True, "auto")
    assert (device.instruction_overhead_seconds, device.host_bandwidth) == (2e-6, 12e9)
    assert "host bandwidth from measured with a copy of 1 GiB" in device.provenance
    assert device.allocator == Allocator()


def test_an_allocator_may_be_described(tmp_path: Path) -> None:
    sizes = (
        "{rounding_bytes: 256, small_limit_bytes: 1024, small_segment_bytes: 4096, "
        "large_limit_bytes: 8192, large_segment_bytes: 16384, segment_rounding_bytes: 2048}"
    )
    cluster = read(tmp_path, SHARED.replace("torch-cuda", sizes))
    assert cluster.device(0).allocator == Allocator(
        rounding_bytes=256,
        small_limit_bytes=1024,
        small_segment_bytes=4096,
        large_limit_bytes=8192,
        large_segment_bytes=16384,
        segment_rounding_bytes=2048,
    )


def test_by_default_nothing_is_shared_and_copies_are_free(tmp_path: Path) -> None:
    cluster = read(tmp_path, INLINE, 2)
    host, device = cluster.hosts[0], cluster.device(0)
    assert (host.adapter_bandwidth, host.link.duplex) == (None, True)
    assert cluster.collectives == "ring"
    assert (device.instruction_overhead_seconds, device.host_bandwidth) == (0.0, None)
    assert device.allocator is None


def test_names_take_their_usual_link_and_network(tmp_path: Path) -> None:
    cluster = read(tmp_path, "hosts: [{device: h100-sxm, count: 1}]")
    assert cluster.name == "lab"
    assert cluster.backend == "nccl"
    assert cluster.hosts[0].link.name == "nvlink4"
    assert cluster.network.name == "ib-ndr-400"


def test_named_links_replace_the_usual_ones(tmp_path: Path) -> None:
    text = "hosts: [{device: a100-80, count: 2, link: pcie4}]\nnetwork: ethernet-25"
    cluster = read(tmp_path, text, 2)
    assert cluster.hosts[0].link.name == "pcie4"
    assert cluster.network.name == "ethernet-25"


def test_only_the_first_devices_are_taken(tmp_path: Path) -> None:
    text = (
        "hosts: [{device: a100-80, count: 4}, {device: h200, count: 4}, {device: h200, count: 4}]"
    )
    sizes = {
        num: [host.num_devices for host in read(tmp_path, text, num).hosts] for num in (1, 4, 6, 12)
    }
    assert sizes == {1: [1], 4: [4], 6: [4, 2], 12: [4, 4, 4]}
    assert read(tmp_path, text, 6).device(4).name == "h200"


def test_too_few_devices(tmp_path: Path) -> None:
    error = refusal(tmp_path, INLINE, 3)
    assert "lab.yaml" in error.message
    assert "2 devices, but 3" in error.message


def test_cpu_hosts_are_measured_and_use_gloo(tmp_path: Path) -> None:
    text = "hosts: [{device: cpu, count: 1}, {device: cpu, count: 1}]\nnetwork: ethernet-10"
    cluster = read(tmp_path, text, 2)
    assert cluster.backend == "gloo"
    assert cluster.link(0, 1).name == "ethernet-10"
    assert cluster.device(0).peak_flops["float32"] > 0


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"absent\.yml.*does not exist"):
        resolve_cluster(str(tmp_path / "absent.yml"), 1)


def test_a_folder_and_bytes_are_not_cluster_files(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("folder.yaml", "bytes.yaml"):
        with pytest.raises(ClusterError, match="cannot be read"):
            resolve_cluster(str(tmp_path / name), 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hosts: [", "not YAML"),
        ("hosts: &a [*b]", "not YAML"),
        ("a: 1\na: 2\nhosts: []", "'a' stands twice"),
        ("hosts: [{device: !!python/object/apply:os.getcwd [], count: 1}]", "not YAML of plain"),
        ("[" * 5000, "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_not_plain_yaml(tmp_path: Path, text: str, expected: str) -> None:
    error = refusal(tmp_path, text)
    assert error.message.startswith("lab.yaml")
    assert expected in error.message


def test_nested_aliases_do_not_explode_in_the_message(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert len(refusal(tmp_path, "\n".join(lines)).message) < 500


def test_an_unsafe_tag_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    refusal(tmp_path, f"hosts: !!python/object/apply:os.mkdir ['{target}']")
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("", "the file", "None"),
        ("just words", "the file", "'just words'"),
        ("hosts: []", "hosts", "[]"),
        ("hosts: 4", "hosts", "4"),
        ("hosts: [{device: a100-80}]", "hosts.0.count", "missing"),
        ("hosts: [{device: a100-80, count: 0}]", "hosts.0.count", "0"),
        ("hosts: [{device: a100-80, count: 1.5}]", "hosts.0.count", "1.5"),
        ("hosts: [{device: a100-80, count: yes}]", "hosts.0.count", "True"),
        ("hosts: [{device: 7, count: 1}]", "hosts.0.device", "7"),
        (INLINE.replace("16e9", "lots"), "hosts.0.device.memory_bytes", "'lots'"),
        (INLINE.replace("16e9", "-1"), "hosts.0.device.memory_bytes.value", "-1"),
        (INLINE.replace("500e9", "0"), "hosts.0.device.memory_bandwidth.value", "0"),
        (INLINE.replace("500e9", ".inf"), "hosts.0.device.memory_bandwidth.value", "inf"),
        (INLINE.replace("500e9", ".nan"), "hosts.0.device.memory_bandwidth.value", "nan"),
        (INLINE.replace("0.9", "1.1"), "network.efficiency.value", "1.1"),
        (INLINE.replace("gloo", "mpi"), "backend", "'mpi'"),
        (SHARED.replace("auto", "star"), "collectives", "'star'"),
        (SHARED.replace("duplex: false", "duplex: 2"), "hosts.0.link.duplex", "2"),
        (SHARED.replace("3e9", "0"), "hosts.0.adapter_bandwidth.value", "0"),
        (SHARED.replace("12e9", "-1"), "hosts.0.device.host_bandwidth.value", "-1"),
        (SHARED.replace("torch-cuda", "best-fit"), "hosts.0.device.allocator", "'best-fit'"),
        (SHARED.replace("2e-6", "-1"), "hosts.0.device.instruction_overhead_seconds", "-1"),
        (
            INLINE.replace("{float32: 10e12, bfloat16: 40e12}", "{}"),
            "hosts.0.device.peak_flops",
            "{}",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_key(
    tmp_path: Path, text: str, key: str, value: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.message.startswith("lab.yaml: ")
    assert key in error.message
    assert value in error.message


def test_an_unknown_key_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    error = refusal(tmp_path, INLINE.replace("memory_bandwidth:", "memory_bandwith:"))
    assert "unknown key hosts.0.device.memory_bandwith = 500" in error.message
    assert error.hint == "did you mean memory_bandwidth?"
    error = refusal(tmp_path, INLINE + "netwrok: ethernet-25\n")
    assert "unknown key netwrok" in error.message
    assert error.hint == "did you mean network?"


@pytest.mark.parametrize(
    ("text", "unknown", "suggestion"),
    [
        ("hosts: [{device: a100_80, count: 1}]", "a100_80", "a100-80"),
        ("hosts: [{device: a100-80, count: 1, link: nvlink33}]", "nvlink33", "nvlink3"),
        ("hosts: [{device: a100-80, count: 1}]\nnetwork: ib-hdr", "ib-hdr", "ib-hdr-200"),
    ],
)
def test_unknown_names_are_refused_with_the_closest_one(
    tmp_path: Path, text: str, unknown: str, suggestion: str
) -> None:
    error = refusal(tmp_path, text)
    assert repr(unknown) in error.message
    assert error.hint == f"did you mean {suggestion}?"


def test_an_inline_device_needs_a_link_and_a_network(tmp_path: Path) -> None:
    without_link = "\n".join(line for line in INLINE.splitlines() if "link:" not in line)
    assert "lab.yaml: hosts.0.link is missing" in refusal(tmp_path, without_link).message
    without_network = "\n".join(line for line in INLINE.splitlines() if "network:" not in line)
    assert "lab.yaml: network is missing" in refusal(tmp_path, without_network).message


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "42\n"])
def test_a_cluster_file_that_is_no_mapping_says_so(content: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ClusterError, match="not a mapping of keys to values"):
        resolve_cluster(str(path), 1)
