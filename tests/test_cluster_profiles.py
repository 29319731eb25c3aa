"""The packaged devices and links: all valid, all figures sourced, and equal to the datasheets."""

import math
from importlib import resources
from typing import Any

import pytest
import yaml

from planner.cluster.found import device_from_properties
from planner.cluster.library import device_names, device_profile, link_spec
from planner.cluster.schema import DeviceProfile, Figure, LinkFile
from planner.cluster.types import Allocator
from planner.errors import ClusterError

DEVICES = (
    "a100-40",
    "a100-80",
    "a100-megatron",
    "b200",
    "h100-sxm",
    "h200",
    "l40s",
    "rtx-4090",
    "v100-32",
)
LINKS = (
    "nvlink2",
    "nvlink3",
    "nvlink4",
    "nvlink5",
    "pcie4",
    "pcie4-staged",
    "pcie5",
    "ib-edr-100",
    "ib-hdr-200",
    "ib-ndr-400",
    "ethernet-10",
    "ethernet-25",
    "ethernet-100",
    "loopback",
)


def raw(file: str) -> Any:
    """The file as plain YAML, read without the package's own schema."""
    path = resources.files("profiles").joinpath("hardware", file)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def unsourced(value: Any, key: str = "") -> list[str]:
    """Keys of numbers that do not stand in a mapping with a non-empty source."""
    if isinstance(value, dict) and set(value) == {"value", "source"}:
        source = value["source"]
        return [] if isinstance(source, str) and len(source) > 10 else [key]
    if isinstance(value, dict):
        return [name for k, v in value.items() for name in unsourced(v, f"{key}.{k}")]
    if isinstance(value, list):
        return [name for i, item in enumerate(value) for name in unsourced(item, f"{key}.{i}")]
    return [key] if isinstance(value, int | float) else []


def test_the_packaged_names_are_the_documented_ones() -> None:
    assert device_names() == DEVICES
    assert tuple(link["name"] for link in raw("links.yaml")["links"]) == LINKS


@pytest.mark.parametrize("name", DEVICES)
def test_device_is_named_as_its_file_and_becomes_a_device(name: str) -> None:
    device = device_profile(name).device.to_device("nowhere")
    assert device.name == name
    assert device.memory_bytes > 20e9 > device.reserved_bytes > 0
    assert {"float32", "bfloat16", "float16", "float64"} <= set(device.peak_flops)
    assert all(math.isfinite(flops) and flops > 1e12 for flops in device.peak_flops.values())
    assert device.host_bandwidth is not None
    assert 10e9 < device.host_bandwidth < device.memory_bandwidth / 10
    assert device.allocator == Allocator()
    assert "\n" not in device.provenance
    assert "nowhere" not in device.provenance, "a figure has no source"


@pytest.mark.parametrize("file", [*(f"{name}.yaml" for name in DEVICES), "links.yaml"])
def test_every_figure_has_a_source(file: str) -> None:
    assert unsourced(raw(file)) == []


def test_a_missing_source_would_be_noticed() -> None:
    bare = {"device": {"memory_bytes": 1, "x": {"value": 2, "source": ""}}}
    assert unsourced(bare) == [".device.memory_bytes", ".device.x"]


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32", "bandwidth", "link", "network"),
    [
        ("a100-40", 312e12, 19.5e12, 1555e9, 300e9, 25e9),
        ("a100-80", 312e12, 19.5e12, 2039e9, 300e9, 25e9),
        ("h100-sxm", 989.4e12, 66.9e12, 3350e9, 450e9, 50e9),
        ("h200", 989.4e12, 66.9e12, 4800e9, 450e9, 50e9),
        ("b200", 2250e12, 75e12, 7700e9, 900e9, 50e9),
        ("v100-32", 15.7e12, 15.7e12, 900e9, 150e9, 6.25e9),
        ("l40s", 362.05e12, 91.6e12, 864e9, 31.5e9, 12.5e9),
        ("rtx-4090", 165.2e12, 82.6e12, 1008e9, 31.5e9, 0.3125e9),
    ],
)
def test_figures_are_dense_and_links_one_direction(
    name: str, bfloat16: float, float32: float, bandwidth: float, link: float, network: float
) -> None:
    profile = device_profile(name)
    device = profile.device.to_device("")
    assert device.peak_flops["bfloat16"] == pytest.approx(bfloat16)
    assert device.peak_flops["float32"] == pytest.approx(float32)
    assert device.memory_bandwidth == pytest.approx(bandwidth)
    assert link_spec(profile.host.link).bandwidth.value == pytest.approx(link)
    nominal = link_spec(profile.network.link).bandwidth.value
    share = profile.network.adapters_per_device.value
    assert nominal * share == pytest.approx(network)


def test_a_link_reaches_its_efficiency_and_its_share_of_adapters() -> None:
    link = link_spec("ib-edr-100").to_link(0.5)
    assert link.bandwidth == pytest.approx(12.5e9 * 0.9 * 0.5)
    assert link.latency_seconds == pytest.approx(9.6e-6)


def test_an_unknown_link_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ClusterError) as caught:
        link_spec("nvlink-3")
    assert "nvlink3" in caught.value.hint


def test_the_schema_has_a_figure_for_every_number() -> None:
    """A number that is not a Figure could not carry a source."""
    for model in (DeviceProfile, LinkFile):
        for name, part in model.model_json_schema()["$defs"].items():
            if "source" in part["properties"]:
                continue
            kinds = {value.get("type") for value in part["properties"].values()}
            assert not kinds & {"number", "integer"}, name
    assert Figure.model_validate(3).value == 3


class Properties:
    """What torch.cuda.get_device_properties reports, as published for real boards."""

    def __init__(self, name: str, capability: tuple[int, int], sms: int, clocks: tuple[int, int]):
        self.name = name
        self.major, self.minor = capability
        self.multi_processor_count = sms
        self.clock_rate, self.memory_clock_rate = clocks
        self.memory_bus_width = 4096 if capability == (7, 0) else 5120
        self.total_memory = 32 * 2**30


@pytest.mark.parametrize(
    ("properties", "profile"),
    [
        (Properties("V100", (7, 0), 80, (1_530_000, 877_000)), "v100-32"),
        (Properties("A100", (8, 0), 108, (1_410_000, 1_215_000)), "a100-40"),
        (Properties("H100", (9, 0), 132, (1_980_000, 2_619_000)), "h100-sxm"),
    ],
)
def test_a_device_built_from_properties_is_close_to_its_datasheet(
    properties: Properties, profile: str
) -> None:
    built = device_from_properties(properties)
    known = device_profile(profile).device.to_device("")
    assert built.memory_bandwidth == pytest.approx(known.memory_bandwidth, rel=0.01)
    for dtype, flops in built.peak_flops.items():
        assert flops == pytest.approx(known.peak_flops[dtype], rel=0.1), dtype
    assert built.memory_bytes == properties.total_memory
    assert "no packaged profile" in built.provenance


def test_a_device_of_unknown_capability_without_clocks_still_has_finite_figures() -> None:
    built = device_from_properties(Properties("new", (99, 0), 1, (0, 0)))
    assert all(0 < flops < math.inf for flops in built.peak_flops.values())
    assert 0 < built.memory_bandwidth < math.inf
