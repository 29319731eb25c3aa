"""Hosts, devices and links: from YAML, from the machine itself, or the documented default."""

from planner.cluster.measure import measure_cpu
from planner.cluster.resolve import known_clusters, resolve_cluster
from planner.cluster.types import (
    Allocator,
    Cluster,
    CollectiveAlgorithm,
    Device,
    Host,
    HostLink,
    Link,
)

__all__ = [
    "Allocator",
    "Cluster",
    "CollectiveAlgorithm",
    "Device",
    "Host",
    "HostLink",
    "Link",
    "known_clusters",
    "measure_cpu",
    "resolve_cluster",
]
