"""Links under several flows: max-min fair rates, ports, adapters, algorithms of collectives."""

import random
from dataclasses import replace

import pytest
from made import made_plan, spans
from synthetic import chain_cluster

from planner.cluster.types import Cluster, CollectiveAlgorithm
from planner.cost import all_reduce_seconds, gather_seconds, transfer_seconds
from planner.plan.types import Plan, Unit
from planner.simulate import simulate
from planner.simulate.sharing import fair_rates


def test_fair_rates_of_a_line() -> None:
    """One long flow over two links of 10 and 4, and a short one on each: 2 and 2, then 8."""
    flows = [[(0, 1), (1, 1)], [(0, 1)], [(1, 1)]]
    assert fair_rates(flows, [10.0, 4.0]) == [2.0, 8.0, 2.0]


def test_a_flow_that_uses_a_link_twice_gets_what_is_left_of_equal_rates() -> None:
    assert fair_rates([[(0, 3)], [(0, 1)]], [8.0]) == [2.0, 2.0]
    assert fair_rates([[(0, 2)]], [8.0]) == [4.0]


@pytest.mark.parametrize("seed", range(50))
def test_fair_rates_fill_a_link_of_every_flow(seed: int) -> None:
    """No link is over-full, and each flow has a full link on which no flow is faster."""
    chooser = random.Random(seed)
    capacities = [chooser.choice((1.0, 2.0, 5.0, 7.5)) for _ in range(5)]
    flows = [
        [
            (link, chooser.choice((1, 1, 2)))
            for link in chooser.sample(range(5), chooser.randint(1, 3))
        ]
        for _ in range(chooser.randint(1, 8))
    ]
    rates = fair_rates(flows, capacities)
    used = [0.0] * 5
    for uses, rate in zip(flows, rates, strict=True):
        for link, number in uses:
            used[link] += number * rate
    assert all(use <= capacity * (1 + 1e-9) for use, capacity in zip(used, capacities, strict=True))
    for uses, rate in zip(flows, rates, strict=True):
        bottlenecks = [
            link
            for link, _ in uses
            if used[link] == pytest.approx(capacities[link])
            and all(
                other <= rate * (1 + 1e-9)
                for those, other in zip(flows, rates, strict=True)
                if any(link == their for their, _ in those)
            )
        ]
        assert bottlenecks


def fan_out(cluster: Cluster, num_bytes: tuple[int, int]) -> Plan:
    """Rank 0 sends `a` to rank 1 and `b` to rank 2 at once."""
    return made_plan(
        """to.1 SEND peer 1 : a.0
        to.2 SEND peer 2 : b.0""",
        "from.0 RECEIVE peer 0 : -> a.0",
        "from.0 RECEIVE peer 0 : -> b.0",
        cluster=cluster,
        sizes={"a": num_bytes[0], "b": num_bytes[1]},
    )


def test_a_lone_transfer_takes_the_formula_to_the_last_bit() -> None:
    cluster = chain_cluster(3, bandwidth=3.0, latency_seconds=0.1)
    plan = made_plan(
        "to.1 SEND peer 1 : a.0",
        "from.0 RECEIVE peer 0 : -> a.0",
        "",
        cluster=cluster,
        sizes={"a": 7},
    )
    assert simulate(plan).step_seconds == transfer_seconds(7, cluster.link(0, 1))


def test_two_transfers_from_one_port_share_it_until_the_shorter_is_through() -> None:
    simulation = simulate(fan_out(chain_cluster(3, bandwidth=4.0, latency_seconds=0.5), (8, 24)))
    # 2 bytes/s each: 8 bytes take 4 s; the other has 16 left, 4 s alone. One latency each.
    assert [event.end_seconds for event in simulation.timeline.events][:2] == [4.5, 8.5]


def test_transfers_to_one_port_share_it_too() -> None:
    plan = made_plan(
        "to.2 SEND peer 2 : a.0",
        "to.2 SEND peer 2 : b.0",
        """from.0 RECEIVE peer 0 : -> a.0
        from.1 RECEIVE peer 1 : -> b.0""",
        cluster=chain_cluster(3, bandwidth=4.0),
        sizes={"a": 8, "b": 8},
    )
    assert simulate(plan).step_seconds == 4.0


@pytest.mark.parametrize(("duplex", "seconds"), [(True, 2.0), (False, 4.0)])
def test_both_directions_share_a_half_duplex_link(duplex: bool, seconds: float) -> None:
    cluster = chain_cluster(2, bandwidth=4.0)
    host = cluster.hosts[0]
    host = replace(host, link=replace(host.link, duplex=duplex))
    plan = made_plan(
        """to.1 SEND peer 1 : a.0
        from.1 RECEIVE peer 1 : -> b.0""",
        """from.0 RECEIVE peer 0 : -> a.0
        to.0 SEND peer 0 : b.0""",
        cluster=replace(cluster, hosts=(host,)),
        sizes={"a": 8, "b": 8},
    )
    assert simulate(plan).step_seconds == seconds


def two_hosts(adapter_bandwidth: float | None, num_devices: int = 4, **changes: object) -> Cluster:
    cluster = chain_cluster(num_devices, devices_per_host=num_devices // 2, bandwidth=4.0)
    hosts = tuple(replace(host, adapter_bandwidth=adapter_bandwidth) for host in cluster.hosts)
    return replace(cluster, hosts=hosts, **changes)


@pytest.mark.parametrize(("adapter_bandwidth", "seconds"), [(None, 2.0), (8.0, 2.0), (4.0, 4.0)])
def test_devices_of_a_host_share_its_adapters(
    adapter_bandwidth: float | None, seconds: float
) -> None:
    plan = made_plan(
        "to.2 SEND peer 2 : a.0",
        "to.3 SEND peer 3 : b.0",
        "from.0 RECEIVE peer 0 : -> a.0",
        "from.1 RECEIVE peer 1 : -> b.0",
        cluster=two_hosts(adapter_bandwidth),
        sizes={"a": 8, "b": 8},
    )
    assert simulate(plan).step_seconds == seconds


@pytest.mark.parametrize(("num_replicas", "seconds"), [(1, 2.0), (2, 4.0), (4, 8.0)])
def test_a_flow_counts_at_an_adapter_once_for_every_replica(
    num_replicas: int, seconds: float
) -> None:
    plan = made_plan(
        "to.1 SEND peer 1 : a.0",
        "from.0 RECEIVE peer 0 : -> a.0",
        cluster=two_hosts(4.0, 2 * num_replicas),
        num_replicas=num_replicas,
        sizes={"a": 8},
    )
    simulation = simulate(plan)
    assert simulation.step_seconds == seconds
    assert simulation.link_bytes["adapters of host 0, out"] == 8 * num_replicas
    assert simulation.link_bytes["network port of rank 0, out"] == 8


UNIT = Unit(
    name="u", dtype="float32", parameters=("p",), num_elements=16, stages=(0,), ranks=(0,)
)  # fmt: skip
REDUCE = "data REDUCE unit u : sum:u.0 -> reduced:u"


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("algorithm", ["ring", "tree", "auto"])
def test_a_lone_collective_takes_the_formula(
    algorithm: CollectiveAlgorithm, num_replicas: int, partition: int
) -> None:
    cluster = chain_cluster(num_replicas, bandwidth=3.0, latency_seconds=0.1)
    plan = made_plan(
        REDUCE,
        cluster=replace(cluster, collectives=algorithm),
        num_replicas=num_replicas,
        units=(UNIT,),
        partition=partition,
    )
    formula = gather_seconds if partition else all_reduce_seconds
    seconds = formula(64, num_replicas, cluster.hosts[0].link, algorithm)
    assert simulate(plan).step_seconds == pytest.approx(seconds, rel=1e-12)


def test_a_collective_over_a_half_duplex_link_takes_the_formula() -> None:
    cluster = chain_cluster(2, bandwidth=4.0)
    link = replace(cluster.hosts[0].link, duplex=False)
    cluster = replace(cluster, hosts=(replace(cluster.hosts[0], link=link),))
    plan = made_plan(REDUCE, cluster=cluster, num_replicas=2, units=(UNIT,))
    assert simulate(plan).step_seconds == all_reduce_seconds(64, 2, link) == 32.0


def test_a_ring_crosses_between_hosts_once_each_way_a_tree_with_every_device() -> None:
    plan = made_plan(REDUCE, cluster=two_hosts(4.0, 8), num_replicas=8, units=(UNIT,))
    ring = simulate(plan).step_seconds
    tree = simulate(replace(plan, cluster=two_hosts(4.0, 8, collectives="tree"))).step_seconds
    auto = simulate(replace(plan, cluster=two_hosts(4.0, 8, collectives="auto"))).step_seconds
    assert ring == 2 * 64 * 7 / 8 / 4.0
    assert tree == 4 * ring  # its last round crosses from each of a host's four devices
    assert auto == ring


def test_transfers_and_collectives_slow_each_other() -> None:
    plan = made_plan(
        f"""{REDUCE}
        to.1 SEND peer 1 : a.0""",
        "from.0 RECEIVE peer 0 : -> a.0",
        cluster=chain_cluster(4, bandwidth=4.0),
        num_replicas=2,
        units=(UNIT,),
        partition=3,
        sizes={"a": 8},
    )
    # The reduce-scatter sends 32 bytes from rank 0, the transfer 8: 4 s at half rate, then 6.
    assert spans(plan, simulate(plan)) == [("REDUCE", 0.0, 10.0), ("SEND", 0.0, 4.0)]


def test_a_tied_reduction_uses_the_ports_of_its_ranks_on_every_replica() -> None:
    tied = replace(UNIT, name="t", ranks=(0, 1))
    line = "data REDUCE_TIED unit t : sum:t.0 -> reduced:t"
    plan = made_plan(line, line, cluster=two_hosts(4.0), num_replicas=2, units=(tied,))
    simulation = simulate(plan)
    # Ranks 0 and 1 lie on different hosts, so both replicas' rings pass the same adapters.
    assert simulation.step_seconds == 2 * 64 / 2 / (4.0 / 2)
    assert simulation.link_bytes["adapters of host 1, in"] == 2 * 64


def test_only_flows_that_share_anything_are_slowed() -> None:
    plan = made_plan(
        """to.1 SEND peer 1 : a.0
        to.2 SEND peer 2 : b.0""",
        "from.0 RECEIVE peer 0 : -> a.0",
        "from.0 RECEIVE peer 0 : -> b.0",
        "to.4 SEND peer 4 : c.0",
        "from.3 RECEIVE peer 3 : -> c.0",
        cluster=chain_cluster(5, bandwidth=4.0),
        sizes={"a": 8, "b": 8, "c": 8},
    )
    simulation = simulate(plan)
    assert spans(plan, simulation, 0) == [("SEND", 0.0, 4.0), ("SEND", 0.0, 4.0)]
    assert spans(plan, simulation, 3) == [("SEND", 0.0, 2.0)]


def test_replicas_on_different_links_go_at_the_slowest_ones_pace() -> None:
    """Three devices a host, two replicas: rank 1 straddles hosts, so one of its peers is far."""
    cluster = chain_cluster(
        6, devices_per_host=3, bandwidth=8.0, network_bandwidth=2.0, network_latency_seconds=1.0
    )
    plan = made_plan(
        "to.1 SEND peer 1 : a.0",
        "from.0 RECEIVE peer 0 : -> a.0",
        "",
        cluster=cluster,
        num_replicas=2,
        sizes={"a": 8},
    )
    assert simulate(plan).step_seconds == 1.0 + 8 / 2.0


@pytest.mark.parametrize("duplex", [True, False])
def test_a_host_with_the_networks_own_kind_of_link_has_two_ports(duplex: bool) -> None:
    """Rank 0 sends to its host's other device and to the next host at once, each at full rate."""
    cluster = two_hosts(None)
    link = replace(cluster.network, duplex=duplex)
    hosts = tuple(replace(host, link=link) for host in cluster.hosts)
    plan = fan_out(replace(cluster, hosts=hosts, network=link), (8, 8))
    simulation = simulate(replace(plan, cluster=replace(plan.cluster, hosts=hosts, network=link)))
    assert simulation.step_seconds == 2.0
    way = "out" if duplex else "both ways"
    assert simulation.link_bytes[f"network port of rank 0, {way}"] == 8
    assert simulation.link_bytes[f"network port of rank 0 between hosts, {way}"] == 8


def test_two_simulations_are_equal() -> None:
    plan = fan_out(chain_cluster(3, bandwidth=0.3, latency_seconds=0.07), (7, 11))
    assert simulate(plan) == simulate(plan)
