"""What instructions take: copies, gathers, split backwards, verdicts, unequal devices, issuing."""

from dataclasses import replace

import pytest
from made import made_plan, spans
from synthetic import chain_cluster, chain_graph, chain_placement, chain_plan, chain_profile

from planner.cluster.types import Allocator, Cluster, Device
from planner.cost import update_seconds
from planner.errors import PlanFileError
from planner.lower import lower
from planner.plan.file import parse_plan, print_plan
from planner.plan.types import Plan, PlanOptions, Unit
from planner.plan.validate import validate_references
from planner.profile import OperatorCount
from planner.simulate import simulate

UNIT = Unit(
    name="u", dtype="float32", parameters=("p",), num_elements=100, stages=(0,), ranks=(0,)
)  # fmt: skip


def with_device(cluster: Cluster, *hosts: int, **figures: object) -> Cluster:
    """Other figures for the devices of these hosts, all where none is named."""
    return replace(
        cluster,
        hosts=tuple(
            replace(host, device=replace(host.device, **figures))
            if not hosts or index in hosts
            else host
            for index, host in enumerate(cluster.hosts)
        ),
    )


def seconds_of(plan: Plan, rank: int = 0) -> dict[str, float]:
    return {opcode: end - start for opcode, start, end in spans(plan, simulate(plan), rank)}


COPIES = """copy.in LOAD stage 0 micro_batch 0 : -> batch:x.0
    copy.in FETCH unit u : host:shard:u -> shard:u
    copy.out EVICT micro_batch 0 : a.0 -> host:a.0
    copy.out SAVE unit u : shard:u moments:u -> host:shard:u host:moments:u"""
SIZES = {
    "batch:x": 16, "shard:u": 40, "moments:u": 80, "a": 24,
    "host:shard:u": 40, "host:moments:u": 80, "host:a": 24,
}  # fmt: skip


def copies(host_bandwidth: float | None) -> Plan:
    cluster = with_device(chain_cluster(1), host_bandwidth=host_bandwidth)
    return made_plan(COPIES, cluster=cluster, sizes=SIZES, units=(UNIT,), forward_seconds=(1.0,))


def test_copies_take_bytes_over_the_bandwidth_to_host_memory() -> None:
    assert seconds_of(copies(8.0)) == {"LOAD": 2.0, "FETCH": 5.0, "EVICT": 3.0, "SAVE": 15.0}


def test_copies_are_free_where_the_bandwidth_is_unknown() -> None:
    assert simulate(copies(None)).step_seconds == 0


def test_copy_engines_work_beside_each_other() -> None:
    simulation = simulate(copies(8.0))
    # EVICT runs beside LOAD and FETCH; SAVE overwrites what FETCH has read by 7.
    assert simulation.step_seconds == 7.0 + 15.0
    assert simulation.stream_seconds == ({"copy.in": 7.0, "copy.out": 18.0},)
    assert simulation.link_bytes == {}


@pytest.mark.parametrize(("bandwidth", "seconds"), [(100.0, 8.0), (1e30, 0.0)])
def test_a_gather_of_one_replica_is_a_copy_on_the_device(bandwidth: float, seconds: float) -> None:
    plan = made_plan(
        "data GATHER unit u : shard:u -> weights:u.0",
        cluster=with_device(chain_cluster(1), memory_bandwidth=bandwidth),
        units=(UNIT,),
        partition=3,
    )
    assert simulate(plan).step_seconds == pytest.approx(seconds)


def test_a_split_backward_takes_its_parts() -> None:
    plan = made_plan(
        """compute FORWARD stage 0 micro_batch 0 : -> saved:0.0
        compute BACKWARD_INPUT stage 0 micro_batch 0 : saved:0.0 -> gradient:a.0
        compute BACKWARD_WEIGHT stage 0 micro_batch 0 : saved:0.0 -> sum:u.0""",
        forward_seconds=(1.0,),
        backward_seconds=2.0,
    )
    assert seconds_of(plan) == {"FORWARD": 1.0, "BACKWARD_INPUT": 1.5, "BACKWARD_WEIGHT": 0.5}
    assert simulate(plan).tail_seconds == 0


@pytest.mark.parametrize("opcode", ["CHECK_FINITE", "CLIP"])
def test_verdicts_read_every_gradient_and_tell_every_rank(opcode: str) -> None:
    line = f"data {opcode} : reduced:u -> verdict.0"
    cluster = chain_cluster(4, devices_per_host=2, bandwidth=1e30, latency_seconds=0.5)
    cluster = with_device(cluster, memory_bandwidth=100.0)
    cluster = with_device(cluster, 1, memory_bandwidth=10.0)
    plan = made_plan(
        line, line, cluster=cluster, num_replicas=2, sizes={"reduced:u": 200, "verdict": 1}
    )
    # The slow host's rank reads for 20 s; a ring of four has 2 x 3 steps.
    assert simulate(plan).step_seconds == 20.0 + 6 * 0.5


def test_an_update_on_the_host_takes_its_memory_and_no_compute() -> None:
    cluster = with_device(chain_cluster(2, devices_per_host=2), memory_bandwidth=1e30)
    hosts = tuple(replace(host, memory_bandwidth=20.0) for host in cluster.hosts)
    lines = """host UPDATE unit u : host:reduced:u host:shard:u -> host:shard:u
        compute FORWARD stage 0 micro_batch 0 : -> saved:0.0"""
    plan = made_plan(
        lines, cluster=replace(cluster, hosts=hosts), units=(UNIT,), num_replicas=2,
        sizes={"host:reduced:u": 40, "host:shard:u": 40}, forward_seconds=(1.0,),
    )  # fmt: skip
    plan = replace(plan, options=replace(plan.options, update_on_host=True))
    device = replace(cluster.hosts[0].device, memory_bandwidth=10.0, memory_efficiency=1.0)
    found = seconds_of(plan)
    slots = plan.options.optimizer_slots
    assert found["UPDATE"] == update_seconds(UNIT.num_elements, device, slots)
    assert simulate(plan).step_seconds == max(found.values())


def test_an_update_waits_for_the_slowest_replica() -> None:
    cluster = with_device(chain_cluster(2, devices_per_host=1), memory_bandwidth=100.0)
    cluster = with_device(cluster, 1, memory_bandwidth=50.0)
    line = "compute UPDATE unit u : reduced:u shard:u -> shard:u"
    plan = made_plan(line, cluster=cluster, num_replicas=2, units=(UNIT,))
    assert simulate(plan).step_seconds == 2 * 4 * 4 * 100 / 50.0


@pytest.mark.parametrize(("dtype", "element_bytes"), [("bfloat16", 2), ("float64", 8)])
def test_an_update_moves_the_bytes_of_its_dtype(dtype: str, element_bytes: int) -> None:
    plan = made_plan(
        "compute UPDATE unit u : sum:u.0 shard:u moments:u -> shard:u moments:u",
        cluster=with_device(chain_cluster(1), memory_bandwidth=100.0),
        units=(replace(UNIT, dtype=dtype),),
    )
    assert simulate(plan).step_seconds == 2 * 4 * element_bytes * 100 / 100.0


@pytest.mark.parametrize("slow_host", [0, 1])
def test_a_stage_takes_as_long_as_on_the_slowest_replica(slow_host: int) -> None:
    cluster = chain_cluster(2, devices_per_host=1)
    cluster = with_device(cluster, kernel_overhead_seconds=1.0)
    cluster = with_device(cluster, slow_host, kernel_overhead_seconds=3.0, message_seconds=0.5)
    graph = chain_graph(2)
    kernels = (OperatorCount(flop=0, moved_bytes=0, dtype="float32", num_kernels=1),)
    profile = replace(
        chain_profile(graph),
        layers=tuple(
            replace(
                layer, forward=kernels, backward=2 * kernels,
                forward_seconds=None, backward_seconds=None,
            )
            for layer in chain_profile(graph).layers
        ),
    )  # fmt: skip
    placement = chain_placement(1, 1, 1, num_replicas=2)
    placement = replace(placement, boundaries=(0, 2))
    plan = lower(graph, profile, cluster, placement, PlanOptions())
    assert (plan.stages[0].forward_seconds, plan.stages[0].backward_seconds) == (6.0, 12.0)


def test_issuing_takes_host_time_between_computes() -> None:
    """Each compute waits until the host has issued it and what stands before it."""
    cluster = with_device(chain_cluster(1), instruction_overhead_seconds=0.25, host_bandwidth=8.0)
    plan = made_plan(
        """copy.in LOAD stage 0 micro_batch 0 : -> batch:x.0
        compute FORWARD stage 0 micro_batch 0 : batch:x.0 -> a.0
        copy.in LOAD stage 0 micro_batch 0 : -> batch:y.0
        copy.in LOAD stage 0 micro_batch 0 : -> batch:z.0
        compute FORWARD stage 0 micro_batch 1 : -> a.1""",
        cluster=cluster,
        sizes={"batch:x": 8, "batch:y": 80, "batch:z": 8},
        forward_seconds=(1.0,),
    )
    assert [(start, end) for _, start, end in spans(plan, simulate(plan))] == [
        (0.25, 1.25),
        (1.5, 2.5),
        (2.75, 12.75),
        (12.75, 13.75),  # behind the other in its stream, which does not hold up the host
        (3.25, 4.25),
    ]


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_on_one_rank_every_instruction_adds_what_its_issue_takes(
    num_stages: int, num_micro_batches: int
) -> None:
    plan = chain_plan(num_stages, 1, num_micro_batches)
    slow = with_device(plan.cluster, instruction_overhead_seconds=0.25)
    added = simulate(plan, slow).step_seconds - simulate(plan).step_seconds
    assert added == pytest.approx(0.25 * len(plan.programs[0]))


def test_issuing_waits_for_buffers_but_not_for_a_peer() -> None:
    cluster = with_device(chain_cluster(2, bandwidth=4.0), instruction_overhead_seconds=0.5)
    plan = made_plan(
        """compute FORWARD stage 0 micro_batch 0 : -> a.0
        to.1 SEND peer 1 : a.0
        compute FORWARD stage 0 micro_batch 1 : -> a.1
        compute FORWARD stage 0 micro_batch 0 : -> a.0""",
        """compute FORWARD stage 1 micro_batch 0 : -> b.0
        from.0 RECEIVE peer 0 : -> a.0""",
        cluster=cluster,
        forward_seconds=(1.0, 5.0),
    )
    # The SEND is issued at 2, but rank 1 only gets to its RECEIVE at 6; then a second's transfer.
    assert spans(plan, simulate(plan)) == [
        ("FORWARD", 0.5, 1.5),
        ("SEND", 6.0, 7.0),
        ("FORWARD", 2.5, 3.5),
        ("FORWARD", 7.5, 8.5),
    ]


def test_a_step_is_slower_by_what_issuing_takes() -> None:
    plan = copies(8.0)
    slow = with_device(plan.cluster, instruction_overhead_seconds=1e-3)
    assert 22.0 < simulate(plan, slow).step_seconds <= 22.0 + 4 * 1e-3


def test_exposed_communication_is_what_idle_compute_waits_for() -> None:
    plan = made_plan(
        """compute FORWARD stage 0 micro_batch 0 : -> a.0
        to.1 SEND peer 1 : a.0""",
        """compute FORWARD stage 1 micro_batch 0 : -> b.0
        from.0 RECEIVE peer 0 : -> a.0
        compute FORWARD stage 1 micro_batch 1 : a.0 -> b.1""",
        cluster=chain_cluster(2, bandwidth=4.0, latency_seconds=0.25),
        sizes={"a": 8},
        forward_seconds=(3.0, 1.0),
    )
    simulation = simulate(plan)
    # Rank 1 is idle from 1 to 5.25: two seconds for rank 0's compute, 2.25 for the transfer.
    assert spans(plan, simulation, 1)[-1] == ("FORWARD", 5.25, 6.25)
    assert simulation.exposed_seconds == (0.0, 2.25)


def test_communication_beside_compute_is_not_exposed() -> None:
    plan = made_plan(
        """to.1 SEND peer 1 : a.0
        compute FORWARD stage 0 micro_batch 0 : -> b.0""",
        """from.0 RECEIVE peer 0 : -> a.0
        compute FORWARD stage 0 micro_batch 0 : -> b.0
        compute FORWARD stage 0 micro_batch 1 : a.0 -> b.1""",
        cluster=chain_cluster(2, bandwidth=4.0),
        sizes={"a": 6},
        forward_seconds=(1.0,),
    )
    simulation = simulate(plan)
    assert simulation.step_seconds == 2.5
    assert simulation.exposed_seconds == (0.0, 0.5)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"host_bandwidth": 0.0}, "impossible host bandwidth"),
        ({"instruction_overhead_seconds": -1.0}, "impossible host bandwidth or overhead"),
        ({"allocator": Allocator(rounding_bytes=0)}, "allocator of impossible sizes"),
    ],
)
def test_a_plan_with_impossible_figures_is_refused(figures: dict[str, object], words: str) -> None:
    plan = chain_plan()
    validate_references(plan)
    with pytest.raises(PlanFileError, match=words):
        validate_references(replace(plan, cluster=with_device(plan.cluster, **figures)))


def test_a_plan_with_impossible_adapters_or_halves_is_refused() -> None:
    plan = chain_plan()
    host = replace(plan.cluster.hosts[0], adapter_bandwidth=0.0)
    with pytest.raises(PlanFileError, match="adapters without bandwidth"):
        validate_references(replace(plan, cluster=replace(plan.cluster, hosts=(host,))))
    stage = replace(plan.stages[0], backward_weight_seconds=2.5)
    with pytest.raises(PlanFileError, match="longer than its backward"):
        validate_references(replace(plan, stages=(stage, *plan.stages[1:])))


def test_new_figures_survive_the_plan_file() -> None:
    plan = chain_plan()
    cluster = with_device(plan.cluster, host_bandwidth=5.0, allocator=Allocator(rounding_bytes=64))
    plan = replace(plan, cluster=replace(cluster, collectives="tree"))
    assert parse_plan(print_plan(plan)) == plan


def test_the_default_device_issues_at_no_cost() -> None:
    device: Device = chain_cluster(1).hosts[0].device
    assert device.instruction_overhead_seconds == 0
    assert device.host_bandwidth is None
    assert device.allocator is None
