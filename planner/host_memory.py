"""Whether hosts have the memory for what their devices offload to them.

Knows the memory of hosts, where a cluster file gives it, and what a plan keeps there. Does not know
how long a copy takes.
"""

from collections import Counter
from dataclasses import replace

from planner.cluster.types import Cluster
from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.plan.types import Plan
from planner.simulate import Simulation
from planner.simulate.memory import host_memory
from planner.solve import Constraints, Simulated

__all__ = ["host_lack_bytes", "simulated_of", "within_host_memory"]


def simulated_of(plan: Plan, simulation: Simulation) -> Simulated:
    """What the solver asks of a simulation."""
    return Simulated(
        step_seconds=simulation.step_seconds,
        peak_bytes=simulation.peak_bytes,
        host_lack_bytes=host_lack_bytes(plan),
    )


def host_lack_bytes(plan: Plan) -> int:
    """What the fullest host lacks for its devices' copies; 0 where all have enough."""
    limits = {
        index: host.memory_bytes
        for index, host in enumerate(plan.cluster.hosts)
        if host.memory_bytes is not None
    }
    if not limits:
        return 0
    taken: Counter[int] = Counter()
    for rank, num_bytes in enumerate(host_memory(plan)):
        for world_rank in plan.grid.replicas_of(rank):
            taken[plan.cluster.host_index(world_rank)] += num_bytes
    return max(0, *(taken[index] - limit for index, limit in limits.items()))


def within_host_memory(
    wanted: Constraints, cluster: Cluster, graph: LayerGraph, optimizer_slots: int
) -> Constraints:
    """The demands, without the offload for which the hosts can never have enough memory.

    Raises:
        UsageError: that offload is demanded.
    """
    known = [host.memory_bytes for host in cluster.hosts if host.memory_bytes is not None]
    if not known:
        return wanted
    if min(known) == 0:
        if wanted.offload_state or wanted.offload_inputs:
            what = "--offload-state" if wanted.offload_state else "--offload-inputs"
            raise UsageError(
                f"{what} needs host memory, but memory_bytes of a host of {cluster.name} is 0",
                hint="correct the cluster file, or plan without offload",
            )
        return replace(wanted, offload_state=False, offload_inputs=False)
    least = sum(
        parameter.num_bytes * (1 + optimizer_slots * parameter.trainable)
        for parameter in graph.parameters
    )
    if len(known) < len(cluster.hosts) or least <= sum(known):
        return wanted
    if wanted.offload_state:
        raise UsageError(
            f"--offload-state needs {least / 1e9:.1f} GB of host memory for weights and optimizer "
            f"state, but the hosts of {cluster.name} have {sum(known) / 1e9:.1f} GB together",
            hint="correct memory_bytes in the cluster file, or plan without offload",
        )
    return replace(wanted, offload_state=False)
