"""From what the user said (a name, a file, nothing) to a Cluster.

Knows the order of preference and the documented default. Does not know any figure.
"""

from pathlib import Path

from planner.cluster.description import read_cluster
from planner.cluster.files import did_you_mean
from planner.cluster.found import found_cluster, num_gpus_found
from planner.cluster.library import device_names, usual_cluster
from planner.cluster.measure import measure_cpu
from planner.cluster.types import Cluster
from planner.errors import ClusterError, UsageError

__all__ = ["DEFAULT_CLUSTER", "known_clusters", "resolve_cluster"]

DEFAULT_CLUSTER = "a100-80"


def known_clusters() -> list[str]:
    """Names that `resolve_cluster` accepts, beside paths of cluster files."""
    return [*device_names(), "cpu"]


def resolve_cluster(name: str | None, num_devices: int) -> Cluster:
    """A cluster of exactly `num_devices` devices.

    `name` is a packaged device (in its usual hosts), `cpu` (measured on this machine), the path
    of a cluster file (its first devices), or None: this machine's GPUs where there are enough,
    else the default, which says so in its provenance.

    Raises:
        UsageError: `num_devices` is below 1.
        ClusterError: the name is unknown, or the file is missing, invalid or too small.
    """
    if num_devices < 1:
        raise UsageError(f"the number of devices is {num_devices}", hint="ask for at least one")
    if name is None:
        return _found_or_default(num_devices)
    if name == "cpu":
        return measure_cpu(num_devices)
    if name.endswith((".yaml", ".yml")):
        return read_cluster(Path(name), num_devices)
    if name not in device_names():
        suggestion = did_you_mean(name, known_clusters())
        raise ClusterError(
            f"unknown cluster {name!r}; known: {', '.join(known_clusters())}, or a .yaml file",
            hint=suggestion or "use a known name, or the path of a cluster file ending in .yaml",
        )
    return usual_cluster(name, num_devices, f"named by the user: {name} in its usual hosts")


def _found_or_default(num_devices: int) -> Cluster:
    num_found = num_gpus_found()
    if num_found >= num_devices:
        return found_cluster(num_devices)
    found = (
        f"only {num_found} of {num_devices} GPUs found here" if num_found else "no GPU found here"
    )
    return usual_cluster(DEFAULT_CLUSTER, num_devices, f"default: {found}; choose with --cluster")
