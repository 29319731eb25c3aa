"""Hosts with too little memory for what their devices offload."""

from dataclasses import replace
from typing import Any

import pytest
from synthetic import chain_cluster, chain_graph, chain_plan

from planner.cluster import Cluster
from planner.errors import UsageError
from planner.host_memory import host_lack_bytes, within_host_memory
from planner.layouts import Layout
from planner.plan.types import PlanOptions
from planner.simulate.memory import host_memory
from planner.solve import Constraints, Simulated

GRAPH = chain_graph(4, num_elements=100)
STATE_BYTES = 4 * 100 * 4 * (1 + 2)


def cluster(*memory_bytes: int | None) -> Cluster:
    made = chain_cluster(2 * len(memory_bytes), devices_per_host=2)
    hosts = zip(made.hosts, memory_bytes, strict=True)
    return replace(made, hosts=tuple(replace(host, memory_bytes=known) for host, known in hosts))


@pytest.mark.parametrize(
    ("memory_bytes", "state", "inputs"),
    [
        ((None, None), None, None),
        ((None, 1), None, None),
        ((STATE_BYTES // 2, STATE_BYTES // 2), None, None),
        ((STATE_BYTES // 2, STATE_BYTES // 2 - 1), False, None),
        ((10**9, 0), False, False),
    ],
)
def test_what_can_never_be_offloaded_is_no_choice(
    memory_bytes: tuple[int | None, ...], state: bool | None, inputs: bool | None
) -> None:
    found = within_host_memory(Constraints(), cluster(*memory_bytes), GRAPH, 2)
    assert (found.offload_state, found.offload_inputs) == (state, inputs)


def test_nor_is_it_done_where_it_is_demanded() -> None:
    with pytest.raises(UsageError, match="memory_bytes of a host of made-up is 0"):
        within_host_memory(Constraints(offload_inputs=True), cluster(0), GRAPH, 2)
    with pytest.raises(UsageError, match="the hosts of made-up have"):
        within_host_memory(Constraints(offload_state=True), cluster(STATE_BYTES - 1), GRAPH, 2)


@pytest.mark.parametrize("layout", Layout)
def test_the_fullest_host(layout: Layout) -> None:
    """Two replicas of two ranks with equal state."""
    shape: dict[str, Any] = {"num_replicas": 2, "num_elements": 100, "layout": layout}
    shape["offload_state"] = True
    plan = chain_plan(4, 2, 1, cluster=cluster(10**6, 10**6), **shape)
    assert host_lack_bytes(plan) == 0
    plan = chain_plan(4, 2, 1, cluster=cluster(1000, 10**6), **shape)
    each = STATE_BYTES // 2  # of a rank; both ranks, or both replicas of a rank, share a host
    assert host_lack_bytes(plan) == 2 * each - 1000
    assert host_lack_bytes(chain_plan(4, 2, 1, cluster=cluster(None, None), **shape)) == 0


@pytest.mark.parametrize("save", [False, True])
def test_updates_on_the_host_need_room_for_gradients_there(save: bool) -> None:
    """Of every unit, and for what the optimizer makes for the one that it updates."""
    shape: dict[str, Any] = {"num_elements": 100, "offload_state": True}
    device, host = (
        chain_plan(4, 1, 1, options=PlanOptions(update_on_host=there, save=save), **shape)
        for there in (False, True)
    )
    host = replace(
        host, units=tuple(replace(unit, update_transient_bytes=7) for unit in host.units)
    )
    assert host_memory(device)[0] == STATE_BYTES * (1 + save)
    assert host_memory(host)[0] == STATE_BYTES * (1 + save) + 4 * 100 * 4 + 7


def test_a_placement_that_a_host_cannot_hold_does_not_fit() -> None:
    simulated = Simulated(step_seconds=1.0, peak_bytes=(5, 7))
    assert simulated.fits((5, 7))
    assert not simulated.fits((5, 6))
    assert not replace(simulated, host_lack_bytes=1).fits((9, 9))
