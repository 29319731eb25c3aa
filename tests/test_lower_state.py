"""Where the state lives, what ends a step, and seconds of the halves of backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from oracle import judge
from synthetic import chain_cluster, chain_graph, chain_placement, chain_plan, chain_profile

from planner.errors import UsageError
from planner.lower import lower
from planner.plan.names import kind_of
from planner.plan.types import Instruction, Opcode, PlanOptions
from planner.schedules import Schedule

END = (Opcode.REDUCE_TIED, Opcode.CHECK_FINITE, Opcode.CLIP, Opcode.UPDATE)
ALL = PlanOptions(check_finite=True, clip_norm=1.0, save=True)


def where(program: tuple[Instruction, ...], wanted: Callable[[Instruction], bool]) -> list[int]:
    return [index for index, instruction in enumerate(program) if wanted(instruction)]


def copied(program: tuple[Instruction, ...], opcode: Opcode, kind: str) -> list[str]:
    """Buffers on the device that are fetched or evicted, in order."""
    names = [
        (i.writes if opcode is Opcode.FETCH else i.reads)[0] for i in program if i.opcode is opcode
    ]
    return [name for name in names if kind_of(name) == kind]


def test_each_update_follows_its_unit_unless_something_must_be_known_first() -> None:
    program = chain_plan(3, 1, 2).programs[0]
    behind = [program[i - 1] for i in where(program, lambda i: i.opcode is Opcode.UPDATE)]
    assert [(i.opcode, i.stage) for i in behind] == [(Opcode.BACKWARD, s) for s in (2, 1, 0)]
    for options, extra in (
        (PlanOptions(check_finite=True), [Opcode.CHECK_FINITE]),
        (PlanOptions(clip_norm=2.0), [Opcode.CLIP]),
        (ALL, [Opcode.CHECK_FINITE, Opcode.CLIP]),
    ):
        program = chain_plan(3, 1, 2, options=options).programs[0]
        tail = [i for i in program if i.opcode in END]
        assert [i.opcode for i in tail] == [*extra, *[Opcode.UPDATE] * 3]
        names = {"CHECK_FINITE": "finite", "CLIP": "scale"}
        for update in tail[len(extra) :]:
            assert {names[opcode.value] for opcode in extra} <= set(update.reads)
            assert set(tail[0].reads) >= {update.reads[0]}
        assert where(program, lambda i: i.opcode is Opcode.BACKWARD)[-1] < program.index(tail[0])


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_updates_need_not_wait_for_a_delayed_norm(num_replicas: int) -> None:
    delayed = PlanOptions(clip_norm=2.0, clip_delayed=True)
    plain, program = (
        chain_plan(3, 1, 2, num_replicas=num_replicas, options=options).programs[0]
        for options in (PlanOptions(), delayed)
    )
    assert [i.opcode for i in program] == [*(i.opcode for i in plain), Opcode.CLIP]
    squares = tuple(f"square:stage.{stage}" for stage in (2, 1, 0))
    assert (program[-1].reads, program[-1].writes) == (squares, ("clip:scale",))
    for update, square in zip(
        (i for i in program if i.opcode is Opcode.UPDATE), squares, strict=True
    ):
        assert "clip:scale" in update.reads
        assert square in update.writes
    assert judge(chain_plan(3, 2, 2, num_replicas=num_replicas, options=delayed)).faults == ()


def test_a_rank_without_trained_units_still_says_that_it_is_finite() -> None:
    graph = chain_graph(2)
    frozen, trained = graph.parameters
    graph = replace(graph, parameters=(replace(frozen, trainable=False), trained))
    placement = chain_placement(2, 2, 1)
    plan = lower(graph, chain_profile(graph), chain_cluster(2), placement, ALL)
    tail = [[i for i in program if i.opcode in END] for program in plan.programs]
    assert [(i.opcode, i.reads) for i in tail[0]] == [
        (Opcode.CHECK_FINITE, ()), (Opcode.CLIP, ())
    ]  # fmt: skip
    assert [i.opcode for i in tail[1]] == [Opcode.CHECK_FINITE, Opcode.CLIP, Opcode.UPDATE]
    assert judge(plan).faults == ()


def test_tied_ranks_enter_their_collectives_in_one_order() -> None:
    plan = chain_plan(4, 4, 1, tied=[(0, 3), (1, 3), (0, 3)], options=ALL)
    found = {
        rank: [i.unit for i in program if i.opcode is Opcode.REDUCE_TIED]
        for rank, program in enumerate(plan.programs)
    }
    assert found[3] == sorted(found[3], key=str)
    assert len(found[3]) == 2
    assert [unit for unit in found[3] if unit in found[0]] == found[0]


def test_save_leaves_every_updated_unit_on_the_host() -> None:
    program = chain_plan(3, 1, 2, options=PlanOptions(save=True)).programs[0]
    saves = where(program, lambda i: i.opcode is Opcode.SAVE)
    assert [program[i - 1].opcode for i in saves] == [Opcode.UPDATE] * 3
    assert [program[i - 1].unit for i in saves] == [program[i].unit for i in saves]
    offloaded = chain_plan(3, 1, 2, offload_state=True, options=PlanOptions(save=True)).programs[0]
    assert not where(offloaded, lambda i: i.opcode is Opcode.SAVE)


def test_an_offloaded_state_comes_for_each_gather_and_update_and_leaves_updated() -> None:
    """Two buffers, three stages: stage 0's weights are gathered again for backward, and its shard
    is then still there for the update; the others' were let go after forward."""
    plan = chain_plan(3, 1, 2, offload_state=True)
    assert plan.gathers
    assert plan.partition == 0
    (program,) = plan.programs
    fetched = [f"shard:stage.{stage}" for stage in (0, 1, 2, 2, 0, 1)]
    assert copied(program, Opcode.FETCH, "shard") == fetched
    moments = [f"moments:stage.{stage}" for stage in (2, 1, 0)]
    assert copied(program, Opcode.FETCH, "moments") == moments
    assert copied(program, Opcode.EVICT, "moments") == moments
    for unit in ("stage.0", "stage.1", "stage.2"):
        (update,) = where(program, lambda i, u=unit: i.opcode is Opcode.UPDATE and i.unit == u)
        assert [program[update + n].reads for n in (1, 2)] == [
            (f"shard:{unit}",), (f"moments:{unit}",)
        ]  # fmt: skip
    assert judge(plan).faults == ()


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_no_shard_is_fetched_while_a_gather_may_still_read_it(
    schedule: Schedule, num_micro_batches: int
) -> None:
    """Such a FETCH would hold up the rank. Compute has used what the gather made before it."""
    plan = chain_plan(
        5, 1, num_micro_batches, schedule=schedule, offload_state=True, num_replicas=2, partition=3
    )
    num_again = 0
    gathers: dict[str, tuple[int, str]] = {}
    for index, instruction in enumerate(plan.programs[0]):
        if instruction.opcode is Opcode.GATHER:
            gathers[instruction.reads[0]] = (index, instruction.writes[0])
        elif instruction.opcode is Opcode.FETCH and instruction.writes[0] in gathers:
            gather, buffer = gathers[instruction.writes[0]]
            between = plan.programs[0][gather:index]
            assert any(i.stream == "compute" and buffer in i.reads for i in between)
            num_again += 1
    assert num_again >= 5


def test_stored_inputs_leave_and_come_back_ahead_of_backward() -> None:
    plan = chain_plan(4, 2, 4, recompute=True, offload_inputs=True)
    for program in plan.programs:
        moved = where(program, lambda i: i.opcode is Opcode.EVICT)
        assert moved
        for index in moved:
            (name,) = program[index].reads
            (fetch,) = where(program, lambda i, n=name: i.reads == (f"host:{n}",))
            between = [i for i in program[index + 1 : fetch] if name in (*i.reads, *i.writes)]
            assert [i.opcode for i in between] == [Opcode.RELEASE]
            ahead = [
                i for i in program[fetch + 1 :] if i.stage is not None and i.stream == "compute"
            ]
            assert [name in i.reads for i in ahead[:3]] == [False, False, True]
    assert judge(plan, max_states=500).faults == ()


def test_inputs_stay_where_they_are_wanted_again_at_once_or_are_sent_on() -> None:
    near = chain_plan(1, 1, 2, offload_inputs=True, recompute=True)
    assert not [i for i in near.programs[0] if i.opcode is Opcode.EVICT]
    # A skip that stage 1 passes on to stage 2, and stores as well.
    graph = chain_graph(6, skips=[(0, 5)])
    layers = list(graph.layers)
    layers[1] = replace(layers[1], inputs=(*layers[1].inputs, "skip_0_5"))
    graph = replace(graph, layers=tuple(layers))
    placement = chain_placement(6, 3, 4, recompute=True, offload_inputs=True)
    profile, cluster = chain_profile(graph), chain_cluster(3)
    plan = lower(graph, profile, cluster, placement, PlanOptions())
    evicted = {i.reads[0] for i in plan.programs[1] if i.opcode is Opcode.EVICT}
    sent = {i.reads[0] for i in plan.programs[1] if i.opcode is Opcode.SEND}
    assert "skip_0_5.0" in sent
    assert evicted
    assert evicted.isdisjoint(sent)


def test_evaluation_under_offload_fetches_only_shards() -> None:
    plan = chain_plan(4, 2, 3, offload_state=True, offload_inputs=True, recompute=True)
    copied = [i for program in plan.evaluation for i in program if i.stream.startswith("copy")]
    assert {i.opcode for i in copied} == {Opcode.FETCH, Opcode.LOAD}
    assert {kind_of(i.writes[0]) for i in copied if i.opcode is Opcode.FETCH} == {"shard"}
    assert len([i for i in copied if i.opcode is Opcode.FETCH]) == 4


def test_partition_means_nothing_to_one_replica() -> None:
    plan = chain_plan(2, 1, 1, partition=3)
    assert (plan.partition, plan.gathers) == (0, False)


def test_seconds_of_the_weights_half_are_the_profiles_or_half() -> None:
    graph = chain_graph(3)
    first, *others = graph.parameters
    graph = replace(graph, parameters=(replace(first, trainable=False), *others))
    profile = chain_profile(graph, backward_seconds=[2.0, 4.0, 6.0])
    last = replace(profile.layers[2], backward_weight_seconds=1.5)
    profile = replace(profile, layers=(*profile.layers[:2], last))

    def seconds(num_stages: int, layers_per_stage: int) -> list[float]:
        placement = chain_placement(num_stages, 1, 1, layers_per_stage=layers_per_stage)
        plan = lower(graph, profile, chain_cluster(1), placement, PlanOptions())
        return [stage.backward_weight_seconds for stage in plan.stages]

    assert seconds(3, 1) == [0.0, 2.0, 1.5]
    assert seconds(1, 3) == [3.5]


def test_pools_are_as_large_as_their_units_need() -> None:
    graph = chain_graph(3)
    sizes = zip(graph.parameters, (1, 5, 3), strict=True)
    graph = replace(graph, parameters=tuple(replace(p, shape=(size,)) for p, size in sizes))

    def shapes(kind: str, options: PlanOptions, **placement: object) -> list[int]:
        placed = chain_placement(3, 1, 2, **placement)  # type: ignore[arg-type]
        cluster = chain_cluster(placed.world_size)
        plan = lower(graph, chain_profile(graph), cluster, placed, options)
        return [buffer.shape[0] for buffer in plan.buffers[0] if kind_of(buffer.name) == kind]

    shared = {"num_replicas": 2, "partition": 3}
    assert shapes("weights", PlanOptions(), **shared) == [6, 6]  # of 5, padded to two parts
    assert shapes("sum", PlanOptions(), **shared) == [6, 6]
    assert shapes("shard", PlanOptions(), **shared) == [1, 3, 2]
    assert shapes("sum", PlanOptions()) == [5]
    assert shapes("sum", PlanOptions(clip_norm=1.0)) == [3, 5, 1]  # in the order of backward
    assert shapes("weights", PlanOptions()) == [1, 5, 3]


ON_HOST = PlanOptions(update_on_host=True)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_updates_on_the_host_get_gradients_and_bring_no_state(
    num_stages: int, num_replicas: int
) -> None:
    """The device sees shards for gathers alone, and of the optimizer's state nothing."""
    plan = chain_plan(
        num_stages, 1, 2, offload_state=True, num_replicas=num_replicas, partition=3,
        options=ON_HOST,
    )  # fmt: skip
    (program,) = plan.programs
    names = {name for i in program for name in (*i.reads, *i.writes)}
    assert not [name for name in names if kind_of(name) == "moments"]
    assert not [i for i in program if i.opcode is Opcode.RELEASE and kind_of(i.reads[0]) == "shard"]
    gathers = where(program, lambda i: i.opcode is Opcode.GATHER)
    assert len(copied(program, Opcode.FETCH, "shard")) == len(gathers)
    kind = "sum" if num_replicas == 1 else "reduced"
    units = [f"stage.{stage}" for stage in reversed(range(num_stages))]
    evicts = [i for i in program if i.opcode is Opcode.EVICT]
    assert [(i.unit, kind_of(i.reads[0])) for i in evicts] == [(unit, kind) for unit in units]
    for unit in units:
        (update,) = (i for i in program if i.opcode is Opcode.UPDATE and i.unit == unit)
        state = (f"host:shard:{unit}", f"host:moments:{unit}")
        assert update.stream == "host"
        assert update.reads == (f"host:reduced:{unit}", *state)
        assert update.writes == state
    assert judge(plan, max_states=3000).faults == ()


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_an_update_on_the_host_is_issued_when_its_gradient_has_had_a_stage_to_leave(
    num_replicas: int,
) -> None:
    """So its issue, which waits for the copy, holds up nothing that could run."""
    plan = chain_plan(
        4, 1, 3, offload_state=True, num_replicas=num_replicas, partition=3, options=ON_HOST
    )
    (program,) = plan.programs
    for stage in (3, 2) if num_replicas == 2 else (3, 2, 1):
        places = [
            where(program, lambda i, o=o, s=stage: i.opcode is o and i.unit == f"stage.{s}")[-1]
            for o in (Opcode.EVICT, Opcode.UPDATE)
        ]
        between = [i for i in program[slice(*places)] if i.opcode is Opcode.BACKWARD]
        assert len(between) == 3
    sums = {
        i.reads[0] for i in program if i.opcode is Opcode.EVICT and kind_of(i.reads[0]) == "sum"
    }
    assert len(sums) == (2 if num_replicas == 1 else 0)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_gradients_leave_before_the_verdicts_that_updates_on_the_host_wait_for(
    num_replicas: int,
) -> None:
    options = replace(ALL, update_on_host=True)
    plan = chain_plan(
        3, 1, 2, offload_state=True, num_replicas=num_replicas, partition=3, options=options
    )
    (program,) = plan.programs
    (check,), (clip,) = (
        where(program, lambda i, o=o: i.opcode is o) for o in (Opcode.CHECK_FINITE, Opcode.CLIP)
    )
    assert max(where(program, lambda i: i.opcode is Opcode.EVICT)) < check < clip
    updates = where(program, lambda i: i.opcode is Opcode.UPDATE)
    assert updates == [clip + 1, clip + 2, clip + 3]
    assert all({"finite", "scale"} <= set(program[index].reads) for index in updates)
    assert not where(program, lambda i: i.opcode is Opcode.SAVE)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "does not offload the state"),
        ({"offload_state": True, "num_replicas": 2, "partition": 1}, "partition 1 keeps"),
        ({"offload_state": True, "num_replicas": 2, "partition": 2}, "partition 2 keeps"),
    ],
)
def test_updates_on_the_host_need_the_state_there(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chain_plan(3, 1, 2, options=ON_HOST, **choices)
