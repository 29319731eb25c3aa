"""What no split of a DAG can undercut, and what none exceeds, without looking at a set.

This module knows nodes and devices. It leaves transfers and edges out.
"""

import math

import numpy

from planner.solve.dag import DagProblem
from planner.solve.dag_contract import Contracted

__all__ = ["HostCapacity", "least_load", "most_load"]

HALVINGS = 60
"""Of an interval, until nothing is left of it."""


class HostCapacity:
    """How many accelerator seconds' worth of nodes a host can run in a time, at most."""

    def __init__(self, graph: Contracted) -> None:
        may = numpy.flatnonzero(~graph.needs_accelerator & ~graph.needs_host)
        host, accelerator = graph.host_seconds[may], graph.accelerator_seconds[may]
        with numpy.errstate(divide="ignore", invalid="ignore"):
            order = numpy.argsort(-numpy.nan_to_num(accelerator / host, nan=0.0), kind="stable")
        # Parts of nodes too: the best there could be, never less than what whole nodes give.
        self._host = numpy.concatenate([[0.0], numpy.cumsum(host[order])])
        self._accelerator = numpy.concatenate([[0.0], numpy.cumsum(accelerator[order])])

    def __call__(self, seconds: float) -> float:
        """`seconds` on the host."""
        last = int(numpy.searchsorted(self._host, seconds, side="right")) - 1
        held = float(self._accelerator[last])
        if last + 1 < len(self._host):
            share = (seconds - self._host[last]) / (self._host[last + 1] - self._host[last])
            held += share * float(self._accelerator[last + 1] - self._accelerator[last])
        return held


def most_load(problem: DagProblem, graph: Contracted) -> float:
    """No split that a device can hold has a larger load."""
    seconds = float(graph.accelerator_seconds.sum() + graph.host_seconds.sum())
    return 1 + seconds + math.fsum(transfer.seconds for transfer in problem.transfers)


def least_load(problem: DagProblem, graph: Contracted) -> float:
    """No split has a smaller load: all devices together hold all nodes, and one each node.

    Transfers are left out, and hosts may take parts of nodes.
    """
    on_host = numpy.where(graph.needs_accelerator, math.inf, graph.host_seconds)
    on_accelerator = numpy.where(graph.needs_host, math.inf, graph.accelerator_seconds)
    each = numpy.minimum(
        on_host if problem.num_hosts else math.inf,
        on_accelerator if problem.num_accelerators else math.inf,
    )
    least = float(each.max(initial=0.0))
    if problem.num_hosts:
        must = float(graph.host_seconds[graph.needs_host].sum())
        least = max(least, must / problem.num_hosts)
    total, capacity = float(graph.accelerator_seconds.sum()), HostCapacity(graph)
    low, high = least, max(least, most_load(problem, graph))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        held = problem.num_accelerators * middle + problem.num_hosts * capacity(middle)
        low, high = (low, middle) if held >= total else (middle, high)
    return low
