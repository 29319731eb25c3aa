"""Changed problems, solved again: what more memory, devices or bandwidth would buy, and what if.

The traced model and its profiles are shared, so a change costs a search. This module knows clusters
and problems. It does not know what a change is wanted for.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.any_schedule import solve_any
from planner.cluster.types import Cluster, Link
from planner.errors import LgaError
from planner.explain.types import PlannerFor, Resolved, Tell, limits_of, simulator, tell_nobody
from planner.solve import Placement, Problem

__all__ = [
    "NO_LIMIT",
    "ClusterAt",
    "WhatIf",
    "changed",
    "grown",
    "offers",
    "resolve",
    "slowest_link",
]

ClusterAt = Callable[[int], Cluster]
"""The user's cluster with so many devices."""
_GIGABYTE = 10**9
_GIGABIT = 1e9 / 8
NO_LIMIT = 2**62
"""Bytes of memory that nothing needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A changed cluster or batch; None leaves what there is."""

    bandwidth: float | None = None
    """Bytes per second of each device and direction: between hosts, or within the only host."""
    latency_seconds: float | None = None
    """Of the same link."""
    host_bandwidth: float | None = None
    """Bytes per second of each device and direction within its host."""
    memory_bytes: int | None = None
    """That tensors may take on each device."""
    num_devices: int | None = None
    global_batch_size: int | None = None


def changed(problem: Problem, what_if: WhatIf, cluster_at: ClusterAt | None = None) -> Problem:
    """The problem under the change. More devices come from `cluster_at`, else from more hosts.

    Raises:
        ClusterError: the cluster has not so many devices.
    """
    cluster, number = problem.cluster, what_if.num_devices
    if number is not None and number > cluster.num_devices:
        cluster = (cluster_at or (lambda count: grown(problem.cluster, count)))(number)
    if what_if.host_bandwidth is not None:
        cluster = _with_host_links(cluster, what_if.host_bandwidth, None)
    used = replace(problem, cluster=cluster, num_devices=number or problem.num_devices)
    slowest = slowest_link(used)
    faster = _with_link(slowest, what_if.bandwidth, what_if.latency_seconds)
    if _is_spread(cluster, used.num_devices):
        cluster = _between_hosts(cluster, slowest, faster)
    else:
        cluster = _with_host_links(cluster, what_if.bandwidth, what_if.latency_seconds)
    return replace(
        problem,
        cluster=cluster,
        num_devices=number or problem.num_devices,
        memory_limit_bytes=what_if.memory_bytes or problem.memory_limit_bytes,
        global_batch_size=what_if.global_batch_size or problem.global_batch_size,
    )


def slowest_link(problem: Problem) -> Link:
    """Between hosts where several are in use, else within the first."""
    cluster = problem.cluster
    if not _is_spread(cluster, problem.num_devices):
        return cluster.hosts[0].link
    hosts = cluster.hosts[: cluster.host_index(problem.num_devices - 1) + 1]
    pairs = itertools.combinations([host.name for host in hosts], 2) if cluster.host_links else ()
    known = {own.between: own.link for own in cluster.host_links}
    links = {known.get(pair) or known.get(pair[::-1], cluster.network) for pair in set(pairs)}
    return min(links or {cluster.network}, key=lambda link: link.bandwidth)


def grown(cluster: Cluster, num_devices: int) -> Cluster:
    """The cluster with more hosts like its largest, the last of them perhaps smaller."""
    hosts = list(cluster.hosts)
    largest = max(hosts, key=lambda host: host.num_devices)
    while (missing := num_devices - sum(host.num_devices for host in hosts)) > 0:
        hosts.append(replace(largest, num_devices=min(largest.num_devices, missing)))
    return replace(cluster, hosts=tuple(hosts))


def resolve(
    words: str,
    problem: Problem,
    planner_for: PlannerFor,
    *,
    known: Placement | None = None,
    time_limit_seconds: float,
) -> Resolved:
    """Solve a changed problem. Where a known placement still fits and is faster, that is it.

    What makes the change impossible (no batch for so many devices, say) is part of the answer.
    """
    planned = planner_for(problem)
    simulate = simulator(planned)
    best: tuple[float, Placement] | None = None
    why = ""
    try:
        limited = replace(problem, time_limit_seconds=time_limit_seconds)
        solution = solve_any(limited, simulate)
        best = solution.step_seconds, solution.placement
    except LgaError as error:
        why = error.message
    if known is not None and known.world_size <= problem.num_devices:
        found = simulate(known)
        is_same_batch = known.global_batch_size == problem.global_batch_size
        fits = found.fits(limits_of(problem, known))
        if is_same_batch and fits and (best is None or found.step_seconds < best[0]):
            best = found.step_seconds, known
    if best is None:
        return _impossible(words, problem, why)
    return Resolved(
        words=words,
        problem=problem,
        placement=best[1],
        step_seconds=best[0],
        peak_bytes=simulate(best[1]).peak_bytes,
    )


def offers(
    problem: Problem,
    planner_for: PlannerFor,
    placement: Placement,
    *,
    cluster_at: ClusterAt | None = None,
    time_limit_seconds: float = 3.0,
    tell: Tell = tell_nobody,
) -> tuple[Resolved, ...]:
    """What one more GB, device, host and Gbit/s would buy, and twice the bandwidth.

    Each is solved again, for at most `time_limit_seconds`.
    """
    found = []
    for words, make in _more(problem, cluster_at):
        tell(words)
        try:
            more = make()
        except LgaError as error:
            found.append(_impossible(words, problem, error.message))
            continue
        limit = time_limit_seconds
        found.append(resolve(words, more, planner_for, known=placement, time_limit_seconds=limit))
    return tuple(found)


def _impossible(words: str, problem: Problem, why: str) -> Resolved:
    return Resolved(words=words, problem=problem, placement=None, step_seconds=None, why_none=why)


def _more(
    problem: Problem, cluster_at: ClusterAt | None
) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Words and the problem with a little more of one thing."""
    number, link = problem.num_devices, slowest_link(problem)
    host = max(host.num_devices for host in problem.cluster.hosts)

    def devices(count: int) -> Callable[[], Problem]:
        return lambda: changed(problem, WhatIf(num_devices=count), cluster_at)

    def bandwidth(rate: float) -> Callable[[], Problem]:
        return lambda: changed(problem, WhatIf(bandwidth=rate))

    yield "1 GB more memory per device", lambda: _with_memory(problem, _GIGABYTE)
    yield "no memory limit", lambda: replace(problem, memory_limit_bytes=NO_LIMIT)
    yield "1 device more", devices(number + 1)
    if host > 1:
        yield f"1 host of {host} devices more", devices(number + host)
    yield f"1 Gbit/s more on {link.name}", bandwidth(link.bandwidth + _GIGABIT)
    yield f"twice the bandwidth on {link.name}", bandwidth(2 * link.bandwidth)


def _with_memory(problem: Problem, num_bytes: int) -> Problem:
    """So many bytes more on each device."""
    if problem.memory_limit_bytes is not None:
        return replace(problem, memory_limit_bytes=problem.memory_limit_bytes + num_bytes)
    kinds = {id(host.device): host.device for host in problem.cluster.hosts}
    # Equal devices stay one object, by which the solver knows kinds of device.
    larger = {
        key: replace(device, memory_bytes=device.memory_bytes + num_bytes)
        for key, device in kinds.items()
    }
    hosts = (replace(host, device=larger[id(host.device)]) for host in problem.cluster.hosts)
    return replace(problem, cluster=replace(problem.cluster, hosts=tuple(hosts)))


def _is_spread(cluster: Cluster, num_devices: int) -> bool:
    """Whether the first devices are on several hosts."""
    return cluster.hosts[0].num_devices < num_devices


def _with_link(link: Link, bandwidth: float | None, latency_seconds: float | None) -> Link:
    return replace(
        link,
        bandwidth=link.bandwidth if bandwidth is None else bandwidth,
        latency_seconds=link.latency_seconds if latency_seconds is None else latency_seconds,
    )


def _with_host_links(
    cluster: Cluster, bandwidth: float | None, latency_seconds: float | None
) -> Cluster:
    hosts = (
        replace(host, link=_with_link(host.link, bandwidth, latency_seconds))
        for host in cluster.hosts
    )
    return replace(cluster, hosts=tuple(hosts))


def _between_hosts(cluster: Cluster, link: Link, other: Link) -> Cluster:
    """With another link between hosts wherever it was `link`. Adapters that a host's devices share
    change in proportion."""
    factor = other.bandwidth / link.bandwidth
    hosts = (
        host
        if host.adapter_bandwidth is None
        else replace(host, adapter_bandwidth=factor * host.adapter_bandwidth)
        for host in cluster.hosts
    )
    return replace(
        cluster,
        network=other if cluster.network == link else cluster.network,
        host_links=tuple(
            replace(own, link=other) if own.link == link else own for own in cluster.host_links
        ),
        hosts=tuple(hosts),
    )
