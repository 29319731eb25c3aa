"""What a measured profile says of sizes that were not measured, and of shared cores."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from models import own
from synthetic import chain_cluster
from torch import nn

from planner.apply_profile import AppliedProfile, apply_profile
from planner.cluster.types import Cluster
from planner.cost import layer_seconds
from planner.errors import UsageError
from planner.measure import measure
from planner.measure.clock import Seconds
from planner.measure.measured import MeasuredLayer, MeasuredModel, MeasuredSize
from planner.measure.session import measured_model
from planner.model_file import model_from_functions
from planner.trace import TracedModel, trace


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4))


def example_batch(batch_size: int) -> own.Batch:
    return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return trace(model_from_functions(build, example_batch, loss_fn=own.square))


def made(traced: TracedModel, **seconds_at: float) -> MeasuredModel:
    """As if every layer had taken so long at `size_<n>`: forward, and twice as long backward."""
    sizes = []
    for word, forward in seconds_at.items():
        size = int(word.removeprefix("size_"))
        counted = measure(traced, size).layers
        parts = {
            part: Seconds(median=times * forward, spread=0.0)
            for part, times in (("forward", 1), ("backward", 2), ("recompute", 1), ("update", 0.5))
        }
        layers = [
            MeasuredLayer(
                signature=node.signature,
                layers=(node.name,),
                profile=replace(
                    profile, **{f"{part}_seconds": found.median for part, found in parts.items()}
                ),
                optimizer_bytes=0,
                forward_peak_bytes=0,
                backward_peak_bytes=0,
                **parts,
            )
            for node, profile in zip(traced.layer_graph(size).layers, counted, strict=True)
        ]
        sizes.append(MeasuredSize(micro_batch_size=size, layers=tuple(layers)))
    return measured_model(traced, sizes, torch.device("cpu"), num_repeats=1, command="")


def a_cpu(num_processes: int = 1) -> Cluster:
    cluster = chain_cluster(num_processes)
    hosts = tuple(
        replace(host, device=replace(host.device, synchronous=True)) for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts)


def applied(traced: TracedModel, measured: MeasuredModel, cluster: Cluster) -> AppliedProfile:
    return apply_profile(measured, traced.layer_graph, cache(partial(measure, traced)), cluster, 2)


def test_between_two_sizes_seconds_lie_on_a_line(traced: TracedModel) -> None:
    found = applied(traced, made(traced, size_2=1.0, size_6=3.0), a_cpu())
    for size, forward in ((2, 1.0), (3, 1.5), (5, 2.5), (6, 3.0)):
        for layer in found.profile_at(size).layers:
            assert layer.forward_seconds == pytest.approx(forward)
            assert layer.backward_seconds == pytest.approx(2 * forward)
            assert layer.recompute_seconds == pytest.approx(forward)
            assert "measured on" in layer.provenance
    assert "interpolated between micro-batches of 2 and 6" in found.note_at(3)
    assert "interpolated" not in found.note_at(6)


@pytest.mark.parametrize(("size", "nearest", "forward"), [(1, 2, 1.0), (12, 6, 3.0)])
def test_beyond_them_the_roofline_scales(
    traced: TracedModel, size: int, nearest: int, forward: float
) -> None:
    cluster = a_cpu()
    found = applied(traced, made(traced, size_2=1.0, size_6=3.0), cluster).profile_at(size)
    here, there = measure(traced, size).layers, measure(traced, nearest).layers
    for layer, now, then in zip(found.layers, here, there, strict=True):
        device = cluster.device(0)
        ratio = layer_seconds(now, device)[0] / layer_seconds(then, device)[0]
        assert layer.forward_seconds == pytest.approx(forward * ratio)


def test_processes_that_share_cores_take_longer(traced: TracedModel) -> None:
    measured = made(traced, size_2=1.0)
    measured = replace(measured, device=replace(measured.device, num_cores=2))
    found = applied(traced, measured, a_cpu(5))
    assert [layer.forward_seconds for layer in found.profile_at(2).layers] == [2.5] * 3
    assert "times 2.5" in found.note_at(2)


def test_updates_become_a_rate_of_the_device(traced: TracedModel) -> None:
    slow = applied(traced, made(traced, size_2=1.0), a_cpu()).cluster.device(0).update_efficiency
    fast = applied(traced, made(traced, size_2=0.1), a_cpu()).cluster.device(0).update_efficiency
    assert slow is not None
    assert fast == pytest.approx(10 * slow)


def test_a_gpu_is_no_cpu(traced: TracedModel) -> None:
    with pytest.raises(UsageError, match="but the cluster"):
        applied(traced, made(traced, size_2=1.0), chain_cluster(1))
