"""Memory over the time of a step: by class, at its peak, and what an allocator reserves for it."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from made import made_plan
from small_plans import small_plan
from synthetic import chain_cluster, chain_plan

from planner.cluster.types import Allocator
from planner.simulate import MemoryByClass, memory_over_time, simulate
from planner.simulate.allocator import CachingAllocator
from planner.timeline import Timeline

MIB = 2**20


def test_a_buffer_lives_from_the_issue_of_its_writer_to_the_end_of_its_last_use() -> None:
    plan = made_plan(
        """compute FORWARD stage 0 micro_batch 0 : -> a.0
        to.1 SEND peer 1 : a.0
        compute FORWARD stage 0 micro_batch 1 : -> b.0""",
        """from.0 RECEIVE peer 0 : -> a.0
        compute FORWARD stage 1 micro_batch 0 : a.0 -> c.0""",
        cluster=chain_cluster(2, bandwidth=4.0),
        sizes={"a": 8, "b": 100, "c": 7},
        forward_seconds=(1.0, 5.0),
    )
    sender, receiver = memory_over_time(plan, simulate(plan).timeline)
    # `a` until its transfer ends at 3, `b` while stage 0 makes it.
    assert sender.seconds == (0.0, 1.0, 2.0, 3.0)
    assert sender.by_class["stored_inputs"] == (8, 108, 8, 0)
    assert (sender.peak_seconds, sender.peak.total_bytes) == (1.0, 108)
    # RECEIVE is issued at once, long before bytes arrive.
    assert receiver.seconds == (0.0, 3.0, 8.0)
    assert receiver.by_class["stored_inputs"] == (8, 15, 0)
    assert receiver.peak == MemoryByClass(stored_inputs=15)
    assert receiver.reserved_bytes == receiver.allocated_bytes == 15


def test_eviction_frees_and_fetching_takes_again() -> None:
    plan = made_plan(
        """compute FORWARD stage 0 micro_batch 0 : -> a.0
        copy.out EVICT micro_batch 0 : a.0 -> host:a.0
        compute FORWARD stage 0 micro_batch 1 : -> b.0
        copy.in FETCH micro_batch 0 : host:a.0 -> a.0
        compute FORWARD stage 0 micro_batch 2 : a.0 -> c.0""",
        sizes={"a": 8, "b": 1, "c": 1, "host:a": 8},
        forward_seconds=(1.0,),
    )
    cluster = chain_cluster(1)
    device = replace(cluster.hosts[0].device, host_bandwidth=16.0)
    cluster = replace(cluster, hosts=(replace(cluster.hosts[0], device=device),))
    (memory,) = memory_over_time(plan, simulate(plan, cluster).timeline)
    assert memory.seconds == (0.0, 1.0, 1.5, 2.0, 2.5, 3.5)
    assert memory.by_class["stored_inputs"] == (8, 9, 1, 8, 9, 0)


@pytest.mark.parametrize("seed", range(40))
def test_no_simulated_moment_holds_more_than_the_worst_case(seed: int) -> None:
    chooser = random.Random(seed)
    plan = small_plan(chooser, max_instructions=200)
    cluster = chain_cluster(
        plan.world_size,
        bandwidth=chooser.choice((1.0, 7.0, 1e30)),
        latency_seconds=chooser.choice((0.0, 0.3)),
    )
    device = replace(
        cluster.hosts[0].device,
        instruction_overhead_seconds=chooser.choice((0.0, 0.1)),
        host_bandwidth=chooser.choice((None, 5.0)),
    )
    cluster = replace(cluster, hosts=(replace(cluster.hosts[0], device=device),))
    simulation = simulate(plan, cluster)
    memory = memory_over_time(plan, simulation.timeline, cluster)
    for rank, worst in zip(memory, simulation.memory, strict=True):
        assert rank.allocated_bytes <= worst.total_bytes
        assert rank.reserved_bytes >= rank.allocated_bytes
        totals = [sum(values) for values in zip(*rank.by_class.values(), strict=True)]
        assert max(totals) == rank.allocated_bytes == rank.peak.total_bytes
        assert min(totals) >= 0
        assert totals[rank.seconds.index(rank.peak_seconds)] == rank.allocated_bytes
        assert list(rank.seconds) == sorted(set(rank.seconds))


def test_one_rank_without_overlap_reaches_the_worst_case() -> None:
    plan = chain_plan(3, 1, 4, saved_bytes=100, transient_bytes=50, width=5)
    simulation = simulate(plan)
    (memory,) = memory_over_time(plan, simulation.timeline)
    assert memory.allocated_bytes == simulation.peak_bytes[0]
    assert memory.peak == simulation.memory[0]
    assert memory.peak.activations == 3 * 4 * 100


def test_the_end_of_a_step_holds_what_stays() -> None:
    plan = chain_plan(4, 2, 3, saved_bytes=100, num_replicas=2, partition=3)
    for rank in memory_over_time(plan, simulate(plan).timeline):
        last = {name: values[-1] for name, values in rank.by_class.items()}
        assert last["activations"] == last["transient"] == 0
        assert last["weights"] > 0
        assert last["optimizer"] == 2 * last["weights"]


def test_reserved_memory_rounds_up_to_segments() -> None:
    plan = chain_plan(2, 1, 2, saved_bytes=3 * MIB, num_elements=MIB)
    device = replace(plan.cluster.hosts[0].device, allocator=Allocator())
    cluster = replace(plan.cluster, hosts=(replace(plan.cluster.hosts[0], device=device),))
    plan = replace(plan, cluster=cluster)
    (memory,) = memory_over_time(plan, simulate(plan).timeline)
    assert memory.reserved_bytes % (2 * MIB) == 0
    assert memory.allocated_bytes < memory.reserved_bytes < 3 * memory.allocated_bytes


def test_an_empty_plan_holds_nothing() -> None:
    (memory,) = memory_over_time(made_plan(""), Timeline(source="simulated", events=()))
    assert (memory.seconds, memory.allocated_bytes, memory.reserved_bytes) == ((0.0,), 0, 0)


@pytest.mark.parametrize(
    ("requests", "reserved"),
    [
        ([1], 2 * MIB),
        ([512] * 4096, 2 * MIB),
        ([512] * 4097, 4 * MIB),
        ([513] * 2048, 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB + 1], 20 * MIB),
        ([MIB + 1] * 19, 20 * MIB),  # the rest, under 1 MiB, is not split off
        ([9 * MIB] * 3, 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([11 * MIB - 1], 12 * MIB),
        ([0], 0),
    ],
)
def test_segments_of_torchs_allocator(requests: list[int], reserved: int) -> None:
    allocator = CachingAllocator(sizes=Allocator())
    for num_bytes in requests:
        allocator.take(num_bytes)
    assert allocator.reserved_bytes == reserved


def test_free_neighbours_merge_and_serve_larger_requests() -> None:
    allocator = CachingAllocator(sizes=Allocator())
    blocks = [allocator.take(5 * MIB) for _ in range(4)]
    assert allocator.reserved_bytes == allocator.allocated_bytes == 20 * MIB
    for block in (blocks[0], blocks[2], blocks[1]):
        allocator.give_back(block)
    assert allocator.allocated_bytes == 5 * MIB
    allocator.take(14 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator(sizes=Allocator())
    large, medium = allocator.take(30 * MIB), allocator.take(12 * MIB)
    allocator.give_back(large)
    allocator.give_back(medium)
    allocator.take(12 * MIB)
    allocator.take(30 * MIB)
    assert allocator.reserved_bytes == 42 * MIB


@pytest.mark.parametrize("seed", range(10))
def test_blocks_never_overlap_and_all_memory_comes_back(seed: int) -> None:
    chooser = random.Random(seed)
    allocator = CachingAllocator(sizes=Allocator())
    held = []
    for _ in range(500):
        if held and chooser.random() < 0.5:
            allocator.give_back(held.pop(chooser.randrange(len(held))))
        else:
            held.append(allocator.take(chooser.choice((3, 700, 2 * MIB, 30 * MIB, MIB))))
        taken = sorted((b.segment, b.offset, b.num_bytes) for b in held if b is not None)
        for one, other in itertools.pairwise(taken):
            assert one[0] != other[0] or one[1] + one[2] <= other[1]
        assert allocator.allocated_bytes == sum(num_bytes for _, _, num_bytes in taken)
    before = allocator.reserved_bytes
    for block in held:
        allocator.give_back(block)
    assert allocator.allocated_bytes == 0
    for _ in range(before // (30 * MIB)):  # at most as many as there is room for
        allocator.take(2 * MIB)
    assert allocator.reserved_bytes == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("seed", range(5))
def test_torchs_own_allocator_reserves_as_much(seed: int) -> None:
    chooser = random.Random(seed)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    model, mine, real = CachingAllocator(sizes=Allocator()), [], []
    for _ in range(300):
        if mine and chooser.random() < 0.5:
            position = chooser.randrange(len(mine))
            model.give_back(mine.pop(position))
            real.pop(position)
        else:
            num_bytes = chooser.choice(
                (3, 700, 2 * MIB, 30 * MIB, MIB, chooser.randint(1, 25 * MIB))
            )
            mine.append(model.take(num_bytes))
            real.append(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))
        assert torch.cuda.memory_reserved() - start == model.reserved_bytes
