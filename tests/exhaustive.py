"""Every placement of a small problem, counted out and simulated: what the solver must equal.

The enumeration shares nothing with the solver but the types of its question and of its answer.
"""

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from synthetic import chain_graph, chain_profile

from planner.cluster.types import Cluster, Device, Host, Link
from planner.graph import LayerGraph
from planner.layouts import Layout
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import OperatorCount, Profile
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated

__all__ = ["Small", "best_seconds", "placements", "random_problem", "simulator"]

_Value = TypeVar("_Value")
MAX_BUFFERS = 3
DEMANDS = tuple(
    field.name
    for field in dataclasses.fields(Constraints)
    if field.name not in ("schedule", "partition_within", "update_on_host")
)
STAGES = ("modular", "stages_per_rank", "num_pipeline_ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """A problem, and what every placement of it takes."""

    problem: Problem
    num_layers: int
    simulated: dict[Placement, Simulated]


def random_problem(
    seed: int,
    max_placements: int,
    *,
    assigned: bool = False,
    grouped: bool = False,
    on_host: bool = False,
) -> Small:
    """A chain of up to 10 unequal layers on up to 4 devices, its memory often tight.

    Demands are added until at most `max_placements` are left; a fresh seed demands other things.
    With `assigned`, stages are free to be on any ranks of at least two, and the first and the last
    layer often share weights; of 3 to 5 layers then. With `grouped`, most states are partitioned
    inside groups of the four replicas, on several hosts. With `on_host` updates run there.
    """
    generator = random.Random(seed)
    num_layers = generator.randint(3, 5) if assigned else generator.randint(1, 10)
    problem = _free_problem(generator, num_layers, assigned=assigned)
    if seed % 3 == 0:
        problem = _mixed(problem)
    wanted: dict[str, int | bool | str] = {}
    if grouped:
        problem = _on_hosts(problem, generator)
        within = generator.choice(["host", 2, None])
        wanted |= {} if within is None else {"partition_within": within}
        wanted["partition"] = generator.choice([1, 2, 3])
        wanted["num_replicas"] = 4
    if on_host:
        wanted |= {"update_on_host": True, "offload_state": True}
    names = [name for name in DEMANDS if not (assigned and name in STAGES) and name not in wanted]
    generator.shuffle(names)
    if assigned:
        wanted["num_pipeline_ranks"] = min(generator.randint(2, 3), problem.num_devices)
    while True:
        demanded = dataclasses.replace(
            problem,
            constraints=Constraints(**wanted),  # type: ignore[arg-type]
        )
        found = list(
            itertools.islice(placements(demanded, num_layers, generator), max_placements + 1)
        )
        if len(found) <= max_placements or not names:
            break
        name = names.pop()
        wanted[name] = generator.choice(sorted({_value(placement, name) for placement in found}))
    simulate_placement = simulator(demanded)
    simulated = {placement: simulate_placement(placement) for placement in found}
    peaks = sorted(max(one.peak_bytes) for one in simulated.values())
    limit = peaks[min(len(peaks) - 1, int(len(peaks) * generator.uniform(0.0, 1.3)))]
    return Small(
        problem=dataclasses.replace(demanded, memory_limit_bytes=limit),
        num_layers=num_layers,
        simulated=simulated,
    )


def _on_hosts(problem: Problem, generator: random.Random) -> Problem:
    """The problem on hosts of two devices or four."""
    num_devices, per_host = generator.choice([(4, 2), (8, 4), (8, 2)])
    cluster = _cluster(generator, num_devices)
    host = dataclasses.replace(
        cluster.hosts[0], num_devices=per_host, adapter_bandwidth=generator.choice([None, 1e8])
    )
    hosts = (host,) * (num_devices // per_host)
    return dataclasses.replace(
        problem,
        cluster=dataclasses.replace(cluster, hosts=hosts),
        num_devices=num_devices,
        global_batch_size=generator.choice([4, 8]),
    )


def _mixed(problem: Problem) -> Problem:
    """The problem with float32 masters of weights that compute in a type half as large."""

    @cache
    def graph_at(size: int) -> LayerGraph:
        graph = problem.graph_at(size)
        parameters = (
            dataclasses.replace(parameter, compute_dtype="bfloat16")
            for parameter in graph.parameters
        )
        return dataclasses.replace(graph, parameters=tuple(parameters))

    return dataclasses.replace(problem, graph_at=graph_at)


def best_seconds(small: Small, *, modular: bool = False) -> float:
    """Of the fastest placement that fits, or of those with stage s on rank s mod P alone; infinite
    where none does."""
    limit = small.problem.memory_limit_bytes
    assert limit is not None
    fitting = (
        simulated.step_seconds
        for placement, simulated in small.simulated.items()
        if max(simulated.peak_bytes) <= limit and (placement.is_modular or not modular)
    )
    return min(fitting, default=math.inf)


def simulator(problem: Problem) -> Callable[[Placement], Simulated]:
    """Lower and simulate, each placement once."""
    options = PlanOptions(
        optimizer_slots=problem.optimizer_slots,
        check_finite=problem.updates_wait,
        update_on_host=problem.updates_on_host,
    )

    @cache
    def simulate_placement(placement: Placement) -> Simulated:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        simulation = simulate(lower(graph, profile, problem.cluster, placement, options))
        return Simulated(step_seconds=simulation.step_seconds, peak_bytes=simulation.peak_bytes)

    return simulate_placement


def placements(
    problem: Problem, num_layers: int, generator: random.Random | None = None
) -> Iterator[Placement]:
    """Every placement that the demands allow; in random order of meshes with a generator."""
    batch = problem.global_batch_size
    meshes = [
        (replicas, ranks, size, batch // replicas // size)
        for replicas in range(1, problem.num_devices + 1)
        for ranks in range(1, min(num_layers, problem.num_devices // replicas) + 1)
        for size in range(1, batch // replicas + 1)
        if batch % (replicas * size) == 0
    ]
    if generator is not None:
        generator.shuffle(meshes)
    wanted = problem.constraints
    for replicas, ranks, size, count in meshes:
        given = (
            (wanted.num_replicas, replicas),
            (wanted.num_pipeline_ranks, ranks),
            (wanted.micro_batch_size, size),
            (wanted.num_micro_batches, count),
        )
        if all(demand in (None, value) for demand, value in given):
            # Ranks of one host differ in nothing but their numbers.
            alike = replicas * ranks <= problem.cluster.hosts[0].num_devices
            stages = _assignments(wanted, num_layers, ranks, alike)
            for placement in _of_mesh(wanted, num_layers, (replicas, ranks, size, count), stages):
                yield from _in_groups(problem, placement)


def _in_groups(problem: Problem, placement: Placement) -> Iterator[Placement]:
    """The placement with the largest groups that are demanded; none where there are none. Where
    nothing is demanded, with all replicas as one group, and with those inside hosts."""
    within, replicas = problem.constraints.partition_within, placement.num_replicas
    if within is None or not placement.partition:
        yield placement
    if not placement.partition:
        return
    ends = list(itertools.accumulate(host.num_devices for host in problem.cluster.hosts))
    rows = [
        [
            sum(placement.grid.world_rank(rank, replica) >= end for end in ends)
            for replica in range(replicas)
        ]
        for rank in range(placement.num_pipeline_ranks)
    ]
    for size in range(replicas, 1, -1):
        groups = [row[first : first + size] for row in rows for first in range(0, replicas, size)]
        inside = all(len(set(group)) == 1 for group in groups)
        if replicas % size == 0 and (size == within if isinstance(within, int) else inside):
            group_size = size if size < replicas else 0
            if group_size or within is not None:
                yield dataclasses.replace(placement, partition_group_size=group_size)
            return


def _assignments(
    wanted: Constraints, num_layers: int, ranks: int, alike: bool
) -> Iterator[tuple[int, ...]]:
    """Ranks of any number of stages: s mod P, or any others unless that is demanded."""
    for per_rank in _allowed(wanted.stages_per_rank, range(1, num_layers // ranks + 1)):
        if per_rank * ranks <= num_layers:
            yield tuple(range(ranks)) * per_rank
    if wanted.modular or wanted.stages_per_rank is not None:
        return
    grown: list[tuple[int, ...]] = [()]
    for number in range(1, num_layers + 1):
        grown = [
            (*assigned, rank)
            for assigned in grown
            for rank in range(ranks)
            if (ranks == 1 or assigned[-1:] != (rank,))
            and not (alike and rank > max(assigned, default=-1) + 1)
        ]
        for assigned in grown:
            is_modular = number % ranks == 0 and assigned == tuple(range(ranks)) * (number // ranks)
            if len(set(assigned)) == ranks and not is_modular:
                yield assigned


def _of_mesh(
    wanted: Constraints,
    num_layers: int,
    mesh: tuple[int, int, int, int],
    assignments: Iterable[tuple[int, ...]],
) -> Iterator[Placement]:
    replicas, ranks, size, count = mesh
    levels = (0, 3) if wanted.update_on_host else range(4)
    partitions = _allowed(wanted.partition, levels if replicas > 1 else (0,))
    offloads = list(
        itertools.product(
            _allowed(wanted.offload_state, (False, True)),
            _allowed(wanted.offload_inputs, (False, True)),
        )
    )
    for stage_ranks in assignments:
        num_stages, per_rank = len(stage_ranks), max(Counter(stage_ranks).values())
        # More buffers than stages are as good as one for each.
        buffers = list(range(1, min(MAX_BUFFERS, per_rank) + 1))
        if wanted.num_buffers is not None:
            buffers = [min(wanted.num_buffers, per_rank)]
        for boundaries, recompute in itertools.product(
            _splits(num_layers, num_stages), _recomputes(wanted, num_stages)
        ):
            for partition, (state, inputs), number, layout in itertools.product(
                partitions, offloads, buffers, _layouts(replicas, ranks)
            ):
                yield Placement(
                    num_replicas=replicas,
                    num_pipeline_ranks=ranks,
                    boundaries=boundaries,
                    stage_ranks=stage_ranks,
                    micro_batch_size=size,
                    num_micro_batches=count,
                    partition=partition,
                    recompute=recompute,
                    num_weight_buffers=number,
                    num_gradient_buffers=number,
                    offload_state=state,
                    offload_inputs=inputs,
                    layout=layout,
                )


def _allowed(demand: _Value | None, values: Iterable[_Value]) -> list[_Value]:
    return [value for value in values if demand in (None, value)]


def _splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *cuts, num_layers)


def _recomputes(wanted: Constraints, num_stages: int) -> Iterator[tuple[bool, ...]]:
    if wanted.recompute is not None:
        return iter([(wanted.recompute,) * num_stages])
    return itertools.product((False, True), repeat=num_stages)


def _value(placement: Placement, name: str) -> int | bool:
    if name == "modular":
        return True
    if name == "stages_per_rank":
        return placement.num_stages // placement.num_pipeline_ranks
    if name == "num_buffers":
        return placement.num_weight_buffers
    if name == "recompute":
        return all(placement.recompute)
    value: int | bool = getattr(placement, name)
    return value


def _free_problem(generator: random.Random, num_layers: int, *, assigned: bool) -> Problem:
    """Nothing demanded, memory without end."""
    uniform = generator.uniform
    forward = [
        1e6 * generator.choice([uniform(0.5, 1.5), 1.0, uniform(2.0, 5.0)])
        for _ in range(num_layers)
    ]
    fixed = generator.choice([0.0, 0.3])
    width, elements = generator.choice([100, 20_000]), generator.choice([1000, 500_000])
    saved = generator.choice([0, 10**5, 10**6])
    tied = [(0, num_layers - 1)] if assigned and generator.random() < 0.5 else []

    @cache
    def graph_at(size: int) -> LayerGraph:
        return chain_graph(
            num_layers, width=width, num_elements=elements, micro_batch_size=size, tied=tied
        )

    @cache
    def profile_at(size: int) -> Profile:
        profile = chain_profile(
            graph_at(size), saved_bytes=saved * size, transient_bytes=10**5 * size
        )
        layers = (
            dataclasses.replace(
                layer,
                forward=_counts(flop * (size + fixed)),
                backward=_counts(2 * flop * (size + fixed)),
                forward_seconds=None,
                backward_seconds=None,
            )
            for layer, flop in zip(profile.layers, forward, strict=True)
        )
        return dataclasses.replace(profile, layers=tuple(layers))

    num_devices = generator.randint(2 if assigned else 1, 4)
    return Problem(
        graph_at=graph_at,
        profile_at=profile_at,
        cluster=_cluster(generator, num_devices),
        num_devices=num_devices,
        global_batch_size=generator.choice([1, 2, 3, 4, 6, 8]),
        updates_wait=generator.random() < 0.2,
        time_limit_seconds=120.0,
        seed=generator.randrange(100),
    )


def _counts(flop: float) -> tuple[OperatorCount, ...]:
    return (OperatorCount(flop=int(flop), moved_bytes=0, dtype="float32", num_kernels=1),)


def _cluster(generator: random.Random, num_devices: int) -> Cluster:
    """Equal or unequal devices in one host or two."""
    device = Device(
        name="test device",
        memory_bytes=2**40,
        peak_flops={"float32": 1e9},
        memory_bandwidth=1e11,
        kernel_overhead_seconds=1e-6,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="made for tests",
        message_seconds=generator.choice([0.0, 0.0, 1e-4]),
        instruction_overhead_seconds=generator.choice([0.0, 0.0, 1e-5]),
        host_bandwidth=generator.choice([None, 1e9]),
    )
    devices = [device, device]
    if num_devices > 1 and generator.random() < 0.25:
        devices[1] = dataclasses.replace(device, peak_flops={"float32": 6e8}, name="slow device")
    bandwidth = generator.choice([1e8, 1e9, 1e10])
    link = Link(name="inside", bandwidth=bandwidth, latency_seconds=1e-6)
    first = generator.randint(1, num_devices)
    counts = [count for count in (first, num_devices - first) if count]
    return Cluster(
        name="test cluster",
        hosts=tuple(
            Host(device=one, num_devices=count, link=link)
            for one, count in zip(devices, counts, strict=False)
        ),
        network=Link(name="between", bandwidth=bandwidth / 10, latency_seconds=1e-5),
        backend=generator.choice(["gloo", "nccl"]),
        provenance="made for tests",
    )


def _layouts(replicas: int, ranks: int) -> tuple[Layout, ...]:
    """Both place the same ranks where there is one replica or one pipeline rank."""
    return tuple(Layout) if replicas > 1 and ranks > 1 else (Layout.REPLICAS_INSIDE,)
