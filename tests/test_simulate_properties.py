"""What must hold of every simulated step, on random plans and clusters of unlike hosts."""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import small_plan
from synthetic import chain_cluster

from planner.cluster.types import Allocator, Cluster, Device, Host, Link
from planner.graph import DTYPE_BYTES
from planner.plan.dependencies import partial_order
from planner.plan.names import buffer_key
from planner.plan.types import Instruction, Opcode, Plan
from planner.simulate import Simulation, memory_over_time, simulate

SEEDS = st.integers(0, 10**6)
ROUNDING = 1e-9


def any_cluster(chooser: random.Random, num_devices: int) -> Cluster:
    """Hosts of one to three devices each, no two alike."""
    hosts = []
    while sum(host.num_devices for host in hosts) < num_devices:
        device = replace(
            chain_cluster(1).hosts[0].device,
            name=f"device {len(hosts)}",
            memory_bandwidth=chooser.choice((30.0, 100.0, 1e30)),
            instruction_overhead_seconds=chooser.choice((0.0, 0.0, 0.01, 0.3)),
            host_bandwidth=chooser.choice((None, 3.0, 50.0)),
            allocator=chooser.choice((None, Allocator())),
        )
        link = Link(
            name=f"link {len(hosts)}",
            bandwidth=chooser.choice((2.0, 16.0, 1e30)),
            latency_seconds=chooser.choice((0.0, 0.2)),
            duplex=chooser.random() < 0.7,
        )
        host = Host(
            device=device,
            num_devices=chooser.randint(1, 3),
            link=link,
            adapter_bandwidth=chooser.choice((None, 1.5, 8.0)),
        )
        hosts.append(host)
    network = Link(
        name="network",
        bandwidth=chooser.choice((1.0, 8.0, 1e30)),
        latency_seconds=chooser.choice((0.0, 0.5)),
        duplex=chooser.random() < 0.7,
    )
    return Cluster(
        name="any",
        hosts=tuple(hosts),
        network=network,
        backend="nccl",
        provenance="made up",
        collectives=chooser.choice(("ring", "tree", "auto")),
    )


def any_plan(seed: int) -> Plan:
    chooser = random.Random(seed)
    plan = small_plan(chooser, max_instructions=150)
    return replace(plan, cluster=any_cluster(chooser, plan.world_size))


def each(plan: Plan, simulation: Simulation) -> list[tuple[int, Instruction, float, float]]:
    """(rank, instruction, start, end)"""
    return [
        (event.rank, plan.programs[event.rank][event.index], event.start_seconds, event.end_seconds)
        for event in simulation.timeline.events
    ]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_timeline_keeps_to_the_partial_order_and_streams_do_one_thing_at_a_time(
    seed: int,
) -> None:
    plan = any_plan(seed)
    simulation = simulate(plan)
    assert simulate(plan) == simulation
    order = partial_order(plan)
    starts, ends = [0.0] * len(order.members), [0.0] * len(order.members)
    streams: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for event in simulation.timeline.events:
        task = order.task_of[event.rank][event.index]
        starts[task], ends[task] = event.start_seconds, event.end_seconds
        stream = plan.programs[event.rank][event.index].stream
        streams[event.rank, stream].append((event.start_seconds, event.end_seconds))
    for task, earlier in enumerate(order.predecessors):
        assert all(starts[task] >= ends[one] for one in earlier)
        assert ends[task] >= starts[task]
    for (rank, stream), spans in streams.items():
        for (_, before), (after, _) in itertools.pairwise(spans):
            assert after >= before
        busy = simulation.stream_seconds[rank][stream]
        assert busy == pytest.approx(sum(end - start for start, end in spans))
        assert simulation.step_seconds >= busy * (1 - ROUNDING)
    for busy, exposed in zip(simulation.busy_seconds, simulation.exposed_seconds, strict=True):
        assert 0 <= exposed <= simulation.step_seconds - busy + ROUNDING


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_no_port_or_adapter_carries_more_than_its_bandwidth_allows(seed: int) -> None:
    plan = any_plan(seed)
    simulation = simulate(plan)
    capacities: dict[str, float] = {}
    for rank in range(plan.num_pipeline_ranks):
        for replica in range(plan.num_replicas):
            host = plan.cluster.hosts[plan.cluster.host_index(plan.world_rank(rank, replica))]
            for link in (host.link, plan.cluster.network):
                for way in ("in", "out", "both ways"):
                    name = f"{link.name} port of rank {rank}, {way}"
                    capacities[name] = min(link.bandwidth, capacities.get(name, link.bandwidth))
    for index, host in enumerate(plan.cluster.hosts):
        for way in ("in", "out", "both ways"):
            capacities[f"adapters of host {index}, {way}"] = host.adapter_bandwidth or 1e300
    for name, num_bytes in simulation.link_bytes.items():
        assert simulation.step_seconds >= num_bytes / capacities[name] * (1 - ROUNDING)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_bytes_of_messages_are_those_of_their_tensors(seed: int) -> None:
    """Each SEND leaves one port and enters another, once each; collectives as their formulas."""
    plan = any_plan(seed)
    plan = replace(plan, cluster=chain_cluster(plan.world_size, bandwidth=3.0))
    simulation = simulate(plan)
    sizes = [{buffer.name: buffer.num_bytes for buffer in table} for table in plan.buffers]
    units = {unit.name: unit for unit in plan.units}
    wanted: dict[str, float] = defaultdict(float)
    sent = [0] * plan.num_pipeline_ranks
    replicas, parts = plan.num_replicas, plan.partition_group_size or plan.num_replicas
    share, groups = (parts - 1) / parts, replicas // parts
    over_groups = 2 * (groups - 1) / groups / parts
    for rank, program in enumerate(plan.programs):
        for instruction in program:
            leaving = 0.0
            unit = units.get(instruction.unit or "")
            if instruction.opcode is Opcode.SEND:
                num_bytes = sizes[rank][buffer_key(instruction.reads[0])]
                sent[rank] += num_bytes
                wanted[f"link port of rank {rank}, out"] += num_bytes
                wanted[f"link port of rank {instruction.peer}, in"] += num_bytes
            elif unit is not None:
                whole = unit.num_elements * DTYPE_BYTES[unit.dtype]
                divides = plan.partition >= 2
                part = -(-unit.num_elements // parts) if divides else None
                reduced = whole if part is None else part * DTYPE_BYTES[unit.dtype]
                leaving = {
                    Opcode.GATHER: whole * share if plan.partition else 0.0,  # a copy
                    Opcode.REDUCE: whole
                    * (share + over_groups if divides else 2 * (replicas - 1) / replicas),
                    Opcode.REDUCE_TIED: 2 * reduced * (len(unit.ranks) - 1) / len(unit.ranks),
                }.get(instruction.opcode, 0.0)
            for way in ("in", "out"):
                if leaving:
                    wanted[f"link port of rank {rank}, {way}"] += leaving
    assert simulation.sent_bytes == tuple(sent)
    assert simulation.link_bytes == pytest.approx(dict(wanted))


def without_sharing(cluster: Cluster) -> Cluster:
    """Full duplex, and adapters that are never short."""
    hosts = tuple(
        replace(host, adapter_bandwidth=None, link=replace(host.link, duplex=True))
        for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts, network=replace(cluster.network, duplex=True))


def with_figures(
    cluster: Cluster, device: Callable[[Device], Device], link: Callable[[Link], Link]
) -> Cluster:
    hosts = tuple(
        replace(host, device=device(host.device), link=link(host.link)) for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts, network=link(cluster.network))


def same_device(device: Device) -> Device:
    return device


def same_link(link: Link) -> Link:
    return link


WORSE: Mapping[str, tuple[Callable[[Device], Device], Callable[[Link], Link]]] = {
    "bandwidth": (same_device, lambda link: replace(link, bandwidth=link.bandwidth / 3)),
    "latency": (same_device, lambda x: replace(x, latency_seconds=2 * x.latency_seconds + 0.1)),
    "memory": (lambda d: replace(d, memory_bandwidth=d.memory_bandwidth / 3), same_link),
    "host": (lambda d: replace(d, host_bandwidth=(d.host_bandwidth or 5.0) / 3), same_link),
    "issue": (
        lambda d: replace(
            d, instruction_overhead_seconds=2 * d.instruction_overhead_seconds + 0.01
        ),
        same_link,
    ),
}


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(sorted(WORSE)))
def test_a_worse_machine_makes_no_step_shorter(seed: int, name: str) -> None:
    """On two ranks at most, without collectives: no two flows share a port. Where they do, a slower
    start can leave a link to another flow, and the step can be shorter."""
    chooser = random.Random(seed)
    while True:
        plan = small_plan(chooser, max_instructions=150)
        tied = any(len(unit.ranks) > 1 for unit in plan.units)
        if plan.num_pipeline_ranks <= 2 and plan.num_replicas == 1 and not tied:
            break
    device, link = WORSE[name]
    cluster = without_sharing(any_cluster(chooser, plan.world_size))
    plan = replace(plan, cluster=cluster)
    worse = simulate(plan, with_figures(cluster, device, link)).step_seconds
    assert worse >= simulate(plan).step_seconds * (1 - ROUNDING)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 4))
def test_slower_compute_makes_no_step_shorter(seed: int, stage: int) -> None:
    plan = any_plan(seed)
    plan = replace(plan, cluster=chain_cluster(plan.world_size, latency_seconds=0.1))
    slow = list(plan.stages)
    stage %= len(slow)
    slow[stage] = replace(slow[stage], forward_seconds=5.0, backward_seconds=9.0)
    slower = simulate(replace(plan, stages=tuple(slow))).step_seconds
    assert slower >= simulate(plan).step_seconds * (1 - ROUNDING)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_memory_over_time_keeps_below_its_bounds(seed: int) -> None:
    plan = any_plan(seed)
    simulation = simulate(plan)
    held = memory_over_time(plan, simulation.timeline)
    for memory, worst in zip(held, simulation.memory, strict=True):
        assert memory.allocated_bytes <= worst.total_bytes
        assert memory.reserved_bytes >= memory.allocated_bytes
        totals = [sum(values) for values in zip(*memory.by_class.values(), strict=True)]
        assert max(totals) == memory.allocated_bytes
        assert all(min(values) >= 0 for values in memory.by_class.values())
        assert memory.seconds[-1] <= simulation.step_seconds


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_every_event_lasts_no_less_than_it_takes_alone(seed: int) -> None:
    plan = any_plan(seed)
    for rank, instruction, start, end in each(plan, simulate(plan)):
        host = plan.cluster.hosts[plan.cluster.host_index(plan.world_rank(rank, 0))]
        if instruction.opcode is Opcode.SEND and instruction.peer is not None:
            spec = next(t for t in plan.tensors if t.name in instruction.reads[0])
            peer = plan.world_rank(instruction.peer, 0)
            link = plan.cluster.link(plan.world_rank(rank, 0), peer)
            alone = link.latency_seconds + spec.num_bytes / link.bandwidth
            assert end - start >= alone - ROUNDING
        elif instruction.opcode in (Opcode.FETCH, Opcode.EVICT) and host.device.host_bandwidth:
            sizes = {buffer.name: buffer.num_bytes for buffer in plan.buffers[rank]}
            num_bytes = sum(sizes[buffer_key(name)] for name in instruction.writes)
            assert end - start >= num_bytes / host.device.host_bandwidth - ROUNDING
