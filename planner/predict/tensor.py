"""T devices of a host as one: the graph, the profile and the cluster that each of them sees.

Every one of the T devices computes its part of each layer and holds its part of the state, and does
its own transfers with its fellow devices of other groups. So one of them stands for all: a device
with a T-th of what is split, on a host with a T-th of the devices. The all-reduces among the T are
part of a layer's seconds. This module divides. It does not know schedules.
"""

import math
from dataclasses import replace

from planner.cluster.types import Cluster
from planner.cost import split_layer_seconds, split_profile, tensor_seconds
from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.profile import LayerProfile, Profile

__all__ = ["split_cluster", "split_graph", "timed_profile"]


def split_cluster(cluster: Cluster, degree: int) -> Cluster:
    """The cluster with every `degree` devices of a host as one; itself at degree 1.

    A pipeline transfer sends the whole tensor from each of them, so bandwidths per device stay, and
    a host's adapters are shared by the `degree` that send at once.

    Raises:
        UsageError: the degree does not divide the devices of some host.
    """
    if degree == 1:
        return cluster
    for index, host in enumerate(cluster.hosts):
        if host.num_devices % degree:
            raise UsageError(
                f"tensor degree {degree} does not divide the {host.num_devices} devices of host "
                f"{index} of cluster {cluster.name}",
                hint="tensor parallelism stays inside a host: use a degree that divides its "
                "devices, or a cluster file with other hosts",
            )
    hosts = tuple(
        replace(
            host,
            num_devices=host.num_devices // degree,
            adapter_bandwidth=None
            if host.adapter_bandwidth is None
            else host.adapter_bandwidth / degree,
        )
        for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts)


def split_graph(graph: LayerGraph, profile: Profile, degree: int) -> LayerGraph:
    """The graph with parameters and boundary tensors at the size that one device holds.

    A parameter that some layer which uses it does not split stays whole.
    """
    if degree == 1:
        return graph
    whole: set[str] = set()
    split: set[str] = set()
    tensors: set[str] = set()
    for layer, found in zip(graph.layers, profile.layers, strict=True):
        parts = set(found.split.parameters) if found.split is not None else set()
        split |= parts
        whole |= set(layer.parameters) - parts
        tensors |= set(found.split.tensors) if found.split is not None else set()
    return replace(
        graph,
        parameters=tuple(
            replace(p, shape=(-(-p.num_elements // degree),))
            if p.name in split and p.name not in whole
            else p
            for p in graph.parameters
        ),
        tensors=tuple(
            replace(t, shape=(-(-math.prod(t.shape) // degree),), stride=(1,))
            if t.name in tensors
            else t
            for t in graph.tensors
        ),
    )


def timed_profile(
    graph: LayerGraph, profile: Profile, cluster: Cluster, degree: int
) -> tuple[Profile, tuple[tuple[float, float], ...]]:
    """The profile of one of `degree` devices, and each layer's seconds of all-reduces.

    The profile's seconds are those of its part of a layer with the all-reduces, on the slowest kind
    of device of the (whole) cluster. At degree 1 it is the profile itself.
    """
    if degree == 1:
        return profile, ((0.0, 0.0),) * len(profile.layers)
    kinds = {id(host.device): host for host in cluster.hosts}.values()
    trained = {p.name for p in graph.parameters if p.trainable}
    parts = split_profile(profile, degree)
    layers: list[LayerProfile] = []
    reduces: list[tuple[float, float]] = []
    for layer, whole, part in zip(graph.layers, profile.layers, parts.layers, strict=True):
        seconds, waiting = max(
            (
                (
                    split_layer_seconds(whole, degree, host.device, host.link, cluster.collectives),
                    tensor_seconds(whole, degree, host.link, cluster.collectives),
                )
                for host in kinds
            ),
            key=lambda found: sum(found[0]),
        )
        forward, backward = seconds
        # The half of backward that makes gradients of parameters needs no all-reduce.
        kernels = backward - waiting[1]
        trains = not trained.isdisjoint(layer.parameters)
        layers.append(
            replace(
                part,
                forward_seconds=forward,
                backward_seconds=backward,
                backward_weight_seconds=kernels / 2 if trains else 0.0,
                recompute_seconds=None,
            )
        )
        reduces.append(waiting)
    return replace(parts, layers=tuple(layers)), tuple(reduces)
