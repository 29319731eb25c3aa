"""Splits of one instance: every method against brute force over all boundaries."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from solve_chain import Layer, make_cluster, make_problem

from planner.solve.bounds import least_rank_units, least_step_ticks
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.classes import bytes_by_class
from planner.solve.instance import (
    Instance,
    RankTables,
    overflow_units,
    rank_units,
    step_ticks,
)
from planner.solve.model import solve_split
from planner.solve.splits import (
    balanced_split,
    fits,
    greedy_split,
    improve,
    uniform_split,
    warm_start,
)
from planner.solve.tables import Table
from planner.solve.types import Split


def random_layers(seed: int, num_layers: int, *, tied: bool = False) -> list[Layer]:
    generator = random.Random(seed)
    return [
        Layer(
            forward_seconds=generator.uniform(1e-4, 3e-3),
            backward_seconds=generator.uniform(1e-4, 5e-3),
            num_elements=generator.randrange(1, 200_000),
            saved_bytes=generator.randrange(0, 100_000),
            output_elements=generator.randrange(1, 20_000),
            transient_bytes=generator.randrange(0, 10_000),
            shares_first=tied and index == num_layers - 1,
        )
        for index in range(num_layers)
    ]


def make_instance(
    layers: list[Layer],
    *,
    replicas: int = 1,
    ranks: int = 1,
    stages: int = 1,
    count: int = 4,
    partition: int = 0,
    recompute: bool = False,
    limit: int = 2**40,
    message_seconds: float = 0.0,
) -> Instance:
    devices = replicas * ranks
    problem = make_problem(
        layers,
        num_devices=devices,
        global_batch_size=replicas * count * 2,
        cluster=make_cluster(
            devices,
            memory_bytes=limit,
            num_hosts=2 if devices % 2 == 0 else 1,
            message_seconds=message_seconds,
        ),
    )
    return Builder(problem=problem).instance(
        Choice(
            num_replicas=replicas,
            num_pipeline_ranks=ranks,
            stages_per_rank=stages,
            micro_batch_size=2,
            num_micro_batches=count,
            partition=partition,
            recompute=recompute,
        )
    )


def splits_of(instance: Instance) -> list[Split]:
    """Every split of an instance, its recompute as its choice has it."""
    splits = all_splits(instance.num_layers, instance.choice.num_stages)
    return [instance.choice.split(boundaries) for boundaries in splits]


def all_splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        (0, *cuts, num_layers)
        for cuts in itertools.combinations(range(1, num_layers), num_stages - 1)
    ]


def brute_force(instance: Instance) -> int | None:
    found = [step_ticks(instance, split) for split in splits_of(instance) if fits(instance, split)]
    return min(found, default=None)


MESHES = [
    (replicas, ranks, stages, partition, recompute)
    for ranks, stages in [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1), (6, 1)]
    for replicas, partition in [(1, 0), (2, 0), (2, 3)]
    for recompute in (False, True)
]


@pytest.mark.parametrize(("replicas", "ranks", "stages", "partition", "recompute"), MESHES)
def test_cp_sat_equals_brute_force(
    replicas: int, ranks: int, stages: int, partition: int, recompute: bool
) -> None:
    seed = hash((replicas, ranks, stages, partition, recompute)) % 1000
    instance = make_instance(
        random_layers(seed, 7),
        replicas=replicas,
        ranks=ranks,
        stages=stages,
        count=1 + seed % 7,
        partition=partition,
        recompute=recompute,
        message_seconds=seed % 2 * 2e-4,
    )
    best = brute_force(instance)
    hint = instance.choice.split(uniform_split(7, ranks * stages))
    answer = solve_split(instance, hint=hint, window=None, time_limit_seconds=30, seed=0)
    assert answer.split is not None
    assert step_ticks(instance, answer.split) == best == answer.bound_ticks
    assert answer.proved
    assert least_step_ticks(instance) <= best


@pytest.mark.parametrize(("replicas", "ranks", "stages", "partition", "recompute"), MESHES[::2])
def test_tight_memory(
    replicas: int, ranks: int, stages: int, partition: int, recompute: bool
) -> None:
    """At the least limit that any split fits, CP-SAT finds that split; a unit below, nothing."""
    instance = make_instance(
        random_layers(5, 7),
        replicas=replicas,
        ranks=ranks,
        stages=stages,
        partition=partition,
        recompute=recompute,
    )
    least = min(max(rank_units(instance, split)) for split in splits_of(instance))
    assert least_rank_units(instance) <= least
    for limit in (least, least - 1):
        tight = dataclasses.replace(instance, limit_units=(limit,) * ranks)
        hint = warm_start(tight)
        answer = solve_split(tight, hint=hint, window=None, time_limit_seconds=30, seed=0)
        assert answer.proved
        if limit == least:
            assert answer.split is not None
            assert fits(tight, answer.split)
            assert step_ticks(tight, answer.split) == brute_force(tight) == answer.bound_ticks
        else:
            assert answer.split is None
            assert not fits(tight, hint)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    num_layers=st.integers(1, 7),
    ranks=st.integers(1, 3),
    stages=st.integers(1, 3),
    replicas=st.sampled_from([1, 2]),
    count=st.integers(1, 9),
    share=st.floats(0.0, 1.0),
    recompute=st.booleans(),
    tied=st.booleans(),
)
def test_any_limit(
    seed: int, num_layers: int, ranks: int, stages: int, replicas: int, count: int,
    share: float, recompute: bool, tied: bool,
) -> None:  # fmt: skip
    if ranks * stages > num_layers:
        ranks = stages = 1
    instance = make_instance(
        random_layers(seed, num_layers, tied=tied),
        replicas=replicas,
        ranks=ranks,
        stages=stages,
        count=count,
        partition=3 if replicas > 1 and seed % 2 else 0,
        recompute=recompute,
    )
    peaks = [max(rank_units(instance, s)) for s in splits_of(instance)]
    limit = round(min(peaks) + share * (max(peaks) - min(peaks)))
    tight = dataclasses.replace(instance, limit_units=(limit,) * ranks)
    best = brute_force(tight)
    answer = solve_split(
        tight, hint=warm_start(tight), window=None, time_limit_seconds=30, seed=seed % 100
    )
    found = None if answer.split is None else step_ticks(tight, answer.split)
    assert found == best
    if best is not None:
        assert least_step_ticks(tight) <= answer.bound_ticks <= best
    assert least_rank_units(tight) <= min(peaks)


def test_window_keeps_near_the_hint() -> None:
    instance = make_instance(random_layers(1, 30), ranks=3, stages=2)
    hint = instance.choice.split(uniform_split(30, 6))
    answer = solve_split(instance, hint=hint, window=1, time_limit_seconds=30, seed=0)
    assert answer.split is not None
    pairs = zip(answer.split.boundaries, hint.boundaries, strict=True)
    assert all(abs(a - b) <= 1 for a, b in pairs)
    assert step_ticks(instance, answer.split) <= step_ticks(instance, hint)


@pytest.mark.parametrize("num_stages", range(1, 8))
def test_balanced_split_is_optimal(num_stages: int) -> None:
    prefix = (0, *itertools.accumulate([5, 1, 9, 3, 3, 7, 2]))

    def largest(split: tuple[int, ...]) -> int:
        return max(prefix[b] - prefix[a] for a, b in itertools.pairwise(split))

    split = balanced_split(prefix, num_stages)
    assert split in all_splits(7, num_stages)
    assert largest(split) == min(largest(other) for other in all_splits(7, num_stages))


@pytest.mark.parametrize("num_stages", range(1, 8))
def test_simple_splits_are_splits(num_stages: int) -> None:
    prefix = (0, *itertools.accumulate([0, 0, 0, 100, 0, 0, 0]))
    assert greedy_split(prefix, num_stages) in all_splits(7, num_stages)
    assert uniform_split(7, num_stages) in all_splits(7, num_stages)


def test_improve_never_worsens() -> None:
    for seed in range(10):
        instance = make_instance(random_layers(seed, 20), ranks=3, stages=2)
        start = instance.choice.split(uniform_split(20, 6))
        assert step_ticks(instance, improve(instance, start, 500)) <= step_ticks(instance, start)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("replicas", "partition"), [(1, 0), (2, 0), (2, 3)])
def test_classes_add_up_to_the_rank(replicas: int, partition: int, recompute: bool) -> None:
    layers = random_layers(3, 7, tied=True)
    problem = make_problem(
        layers, num_devices=2 * replicas, cluster=make_cluster(2 * replicas, memory_bytes=2**20)
    )
    builder = Builder(problem=problem)
    choice = Choice(
        num_replicas=replicas,
        num_pipeline_ranks=2,
        stages_per_rank=2,
        micro_batch_size=1,
        num_micro_batches=3,
        partition=partition,
        recompute=recompute,
    )
    instance = builder.instance(choice)
    assert instance.unit_bytes == 1
    for split in splits_of(instance):
        classes = [bytes_by_class(instance, split, rank) for rank in range(2)]
        assert [sum(c.values()) for c in classes] == rank_units(instance, split)


def test_memory_by_hand() -> None:
    """Two layers on two ranks: state 3 x weights, one gradient buffer, M micro-batches kept."""
    layers = [
        Layer(num_elements=10, saved_bytes=100, output_elements=2, transient_bytes=7),
        Layer(num_elements=20, saved_bytes=50, output_elements=2, transient_bytes=9),
    ]
    instance = make_instance(layers, ranks=2, count=3)
    crossing, batch = 2 * 2 * 4, 3 * 2 * 4 * 4
    # Before backward begins, all outputs may still be on their way and three gradients have come.
    first = 4 * 40 + 3 * 200 + batch + 3 * crossing + 3 * crossing
    last = 4 * 80 + 3 * (100 + crossing) + 18
    small = dataclasses.replace(
        make_instance(layers, ranks=2, count=3, limit=2**20), limit_units=(first, last)
    )
    assert instance.unit_bytes > 1
    split = small.choice.split((0, 1, 2))
    assert rank_units(small, split) == [first, last]
    assert overflow_units(small, split) == (0, 0)


def uniform_instance(
    *, ranks: int, stages: int, count: int, hop: int = 0, replicas: int = 1, reduction: int = 0
) -> Instance:
    """Every layer 4 ticks forward and 8 backward, a hop `hop` ticks each way, a reduction of one
    layer `reduction` ticks."""
    num_layers = ranks * stages
    base = make_instance(
        [Layer()] * num_layers, ranks=ranks, stages=stages, count=count, replicas=replicas
    )
    table = (0, *[hop] * (num_layers - 1), 0)
    (kind,) = base.kinds
    nothing = {field.name: Table.of([0] * num_layers) for field in dataclasses.fields(kind)}
    tables = {
        "forward": Table.of([4] * num_layers),
        "backward": Table.of([8] * num_layers),
        "reduce": Table.of([reduction] * num_layers),
    }
    changed = RankTables(**{**nothing, **tables, "least_update": 0})  # type: ignore[arg-type]
    hops = (table,) * len(base.hops)
    return dataclasses.replace(base, kinds=(changed,), hops=hops, gradient_hops=hops)


@pytest.mark.parametrize(
    ("count", "hop", "overhead"),
    [
        (4, 0, 0.1875), (5, 0, 0.15), (6, 0, 0.125), (8, 0, 0.09375),
        (4, 1, 0.34375), (5, 1, 0.175), (6, 1, 0.1458333), (8, 1, 0.109375),
        (1, 0, 3.0), (2, 0, 1.125), (3, 0, 0.5),
    ],
)  # fmt: skip
def test_overhead_of_equal_stages(count: int, hop: int, overhead: float) -> None:
    """Known makespans of the layered order on 4 ranks x 4 stages, with and without hops."""
    instance = uniform_instance(ranks=4, stages=4, count=count, hop=hop)
    ideal = 12 * 4 * count
    split = instance.choice.split(uniform_split(16, 16))
    assert step_ticks(instance, split) / ideal - 1 == pytest.approx(overhead)


@pytest.mark.parametrize(("reduction", "exposed"), [(1, 1), (8, 8), (10, 10), (16, 16), (20, 32)])
def test_exposed_reduction(reduction: int, exposed: int) -> None:
    """4 ranks x 4 stages, 8 micro-batches: a reduction hides behind 8 backwards of 2 units."""
    alone = uniform_instance(ranks=4, stages=4, count=8, replicas=2)
    with_reduction = uniform_instance(
        ranks=4, stages=4, count=8, replicas=2, reduction=4 * reduction
    )
    split = alone.choice.split(uniform_split(16, 16))
    found = step_ticks(with_reduction, split) - step_ticks(alone, split)
    assert found == 4 * exposed
