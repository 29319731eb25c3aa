"""Many stages per rank: the beam search and the bounds, against brute force over all cuts."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve_split import all_splits, brute_force, make_instance, random_layers

from planner.solve.bounds import least_step_ticks
from planner.solve.floor_stages import staged_seconds
from planner.solve.instance import Instance, step_ticks
from planner.solve.rates import LayerFloors
from planner.solve.sketch import sketch
from planner.solve.space import Batching
from planner.solve.splits import balanced_split, improve, largest_stage
from planner.solve.staircase import all_courses, climbs, few_courses, staircase


def turns(seed: int, num_layers: int, ranks: int, stages: int, count: int) -> Instance:
    """Unequal layers on ranks with so many stages each."""
    layers = random_layers(seed, num_layers)
    return make_instance(layers, ranks=ranks, stages=stages, count=count)


def floors_of(instance: Instance) -> LayerFloors:
    """The layers' seconds as the search knows them before it has a split problem."""
    kind, tick = instance.kinds[0], instance.tick_seconds
    nothing = np.zeros(instance.num_layers)
    values = {name: np.array(getattr(kind, name).layers) * tick for name in ("forward", "backward")}
    names = set(LayerFloors.__dataclass_fields__) - {*values, "is_exact"}
    return LayerFloors(**values, **dict.fromkeys(names, nothing), is_exact=True)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    mesh=st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2)]),
    more=st.integers(0, 3),
    count=st.integers(1, 12),
)
def test_bounds_never_exceed_the_optimum(
    seed: int, mesh: tuple[int, int], more: int, count: int
) -> None:
    ranks, stages = mesh
    instance = turns(seed, ranks * stages + more, ranks, stages, count)
    best = brute_force(instance)
    assert best is not None
    assert least_step_ticks(instance) <= best
    batching = Batching(
        num_replicas=1, num_pipeline_ranks=ranks, micro_batch_size=2, num_micro_batches=count
    )
    assert staged_seconds(batching, floors_of(instance), stages) <= best * instance.tick_seconds


@pytest.mark.parametrize("num_stages", range(1, 8))
def test_largest_stage_is_the_least_of_all_splits(num_stages: int) -> None:
    prefix = (0, *itertools.accumulate([5, 1, 9, 3, 3, 7, 2]))
    sizes = [
        max(prefix[end] - prefix[first] for first, end in itertools.pairwise(split))
        for split in all_splits(7, num_stages)
    ]
    assert largest_stage(prefix, num_stages) == min(sizes)


def test_few_micro_batches_are_solved_to_the_bound() -> None:
    """While one micro-batch runs through all stages, the longest stage has time for the others."""
    alike = [
        dataclasses.replace(layer, backward_seconds=2 * layer.forward_seconds)
        for layer in random_layers(0, 160)
    ]
    instance = make_instance(alike, ranks=16, stages=5, count=4)
    split = sketch(instance)
    assert split is not None
    assert step_ticks(instance, split) <= 1.02 * least_step_ticks(instance)


def test_more_stages_than_layers_are_refused() -> None:
    instance = turns(0, 5, 2, 2, 3)
    batching = Batching(
        num_replicas=1, num_pipeline_ranks=2, micro_batch_size=2, num_micro_batches=3
    )
    with pytest.raises(ValueError, match="6 stages of 5 layers"):
        staged_seconds(batching, floors_of(instance), 3)


@pytest.mark.parametrize("seed", range(12))
def test_beams_come_near_the_optimum(seed: int) -> None:
    ranks, stages = [(2, 2), (2, 3), (3, 2), (2, 4)][seed % 4]
    instance = turns(seed, ranks * stages + 5, ranks, stages, 2 * ranks)
    found = {staircase(instance, course, 50) for course in all_courses()}
    assert found <= set(all_splits(instance.num_layers, ranks * stages))
    splits = [instance.choice.split(boundaries) for boundaries in found]
    least = min(step_ticks(instance, improve(instance, split, 500)) for split in splits)
    best = brute_force(instance)
    assert best is not None
    assert least <= 1.005 * best


@pytest.mark.parametrize(("num_layers", "ranks", "stages"), [(120, 8, 5), (300, 16, 10)])
def test_beams_beat_equal_stages(num_layers: int, ranks: int, stages: int) -> None:
    """Stages as equal as can be make ranks wait; and a local search does not mend that."""
    instance = turns(1, num_layers, ranks, stages, 2 * ranks)
    assert climbs(instance)
    equal = instance.choice.split(balanced_split(instance.time, ranks * stages))
    beams = (staircase(instance, course, 50) for course in few_courses())
    best = min(step_ticks(instance, instance.choice.split(cuts)) for cuts in beams)
    assert best < 0.98 * step_ticks(instance, improve(instance, equal, 1500))


def test_as_many_stages_as_layers_leave_one_split() -> None:
    instance = turns(2, 12, 3, 4, 5)
    for course in few_courses():
        assert staircase(instance, course, 10) == tuple(range(13))


def test_one_rank_or_one_stage_each_has_no_turns() -> None:
    assert not climbs(turns(3, 6, 1, 3, 2))
    assert not climbs(turns(3, 6, 3, 1, 2))
