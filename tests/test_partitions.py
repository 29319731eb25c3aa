"""State partition levels 1 and 2: each replica updates its part of weights that stay whole."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from plan_changes import broken_rules, changed, counterexample, dropped, find, moved, repeated
from planned import Chain, assert_same, model_of, plan_of, square, vectors
from stepping import on_every_rank
from synthetic import chain_cluster, chain_plan
from test_memory_run import assert_bounded
from test_memory_run import plan as plan_with_updates
from torch import Tensor, nn
from training import Run, train_by_plan

from planner.plan.names import kind_of
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.simulate.memory import peak_memory, resident_memory
from runtime.executor import Executor

FLOAT = 4
ENDS = PlanOptions(deadline_seconds=20, check_finite=True, clip_norm=1e9, save=True)
"""The norm is far below, so the factor is one: a norm's last bits depend on how it is grouped."""
NUM_STEPS = 2


class TiedEnds(nn.Module):
    """The last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.last(self.middle(self.first(x).relu()).relu()).relu())
        return output


CHAIN = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), 4))
TIED = model_of(TiedEnds)


def found(plan: Plan, opcode: Opcode, rank: int = 0) -> list[int]:
    return [i for i, line in enumerate(plan.programs[rank]) if line.opcode is opcode]


@pytest.mark.parametrize("partition", [1, 2])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_updated_parts_are_gathered_once_behind_their_update(
    schedule: Schedule, partition: int
) -> None:
    plan = chain_plan(6, 2, 3, num_replicas=2, partition=partition, schedule=schedule)
    for program in plan.programs:
        gathers = [i for i, line in enumerate(program) if line.opcode is Opcode.GATHER]
        assert Counter(program[i].unit for i in gathers) == Counter(
            unit.name for unit in plan.units if program in [plan.programs[r] for r in unit.ranks]
        )
        for index in gathers:
            before = program[index - 1]
            assert (before.opcode, before.unit) == (Opcode.UPDATE, program[index].unit)
            assert program[index].writes == (f"weights:{program[index].unit}",)
    assert not [i for p in plan.evaluation for i in p if i.opcode is Opcode.GATHER]


def test_the_gather_of_a_stage_runs_beside_the_backward_of_the_next() -> None:
    """It starts ahead of that stage's reduction, so one of each is left behind the last backward.

    With one micro-batch there is no room before the stage's end.
    """
    for num_micro_batches, recompute, early in ((2, False, 3), (3, True, 3), (1, False, 2)):
        plan = chain_plan(4, 1, num_micro_batches, num_replicas=2, partition=2, recompute=recompute)
        last_backward = found(plan, Opcode.BACKWARD)[-1]
        assert sum(index < last_backward for index in found(plan, Opcode.GATHER)) == early
        order = [line.opcode for line in plan.programs[0] if line.stream == "data"]
        alternating = [Opcode.REDUCE, Opcode.GATHER] * 4
        late = [Opcode.REDUCE, *[Opcode.REDUCE, Opcode.GATHER] * 3, Opcode.GATHER]
        assert order == (alternating if num_micro_batches > 1 else late)


def test_memory_by_level() -> None:
    """10 elements in each of four stages, two replicas; buffers of two stages."""
    resident = [
        resident_memory(chain_plan(4, 1, 1, num_elements=10, num_replicas=2, partition=level), 0)
        for level in range(4)
    ]
    assert [moment.weights for moment in resident] == [4 * 10 * FLOAT] * 3 + [4 * 5 * FLOAT]
    assert [moment.optimizer for moment in resident] == [80 * FLOAT] + [40 * FLOAT] * 3
    assert [moment.gradients for moment in resident] == [2 * 10 * FLOAT] * 4
    assert [moment.buffers for moment in resident] == [0, 0, 0, 2 * 10 * FLOAT]
    sizes = {
        level: {b.name: b.num_bytes for b in made.buffers[0]}
        for level in range(4)
        for made in [chain_plan(4, 1, 1, num_elements=9, num_replicas=2, partition=level)]
    }
    reduced = [sizes[level]["reduced:stage.0"] for level in range(4)]
    assert reduced == [9 * FLOAT, 10 * FLOAT, 5 * FLOAT, 5 * FLOAT]  # padded to equal parts
    assert [sizes[level]["shard:stage.0"] for level in (0, 1)] == [9 * FLOAT, 5 * FLOAT]


def test_mixed_precision_has_whole_copies_and_masters_of_a_part() -> None:
    """Weights of a rank: four stages of 10 elements; masters of 4 bytes, copies of 2."""
    found = []
    for level in range(4):
        plan = chain_plan(
            4, 1, 1, num_elements=10, num_replicas=2, partition=level, compute_dtype="bfloat16"
        )
        (moment,) = peak_memory(plan)
        found.append((moment.weights, moment.buffers))
    assert found == [
        (40 * (4 + 2), 0),
        (40 * 2 + 20 * 4, 0),
        (40 * 2 + 20 * 4, 0),
        (20 * 4, 2 * 10 * 2),
    ]


def test_what_is_offloaded_with_whole_weights_are_the_moments() -> None:
    plan = chain_plan(4, 1, 2, num_replicas=2, partition=2, offload_state=True)
    assert (plan.gathers, plan.offloaded) == (False, ("moments",))
    moved_names = [
        kind_of(i.reads[0].removeprefix("host:"))
        for i in plan.programs[0]
        if i.opcode in (Opcode.FETCH, Opcode.EVICT, Opcode.RELEASE)
    ]
    assert moved_names == ["moments"] * 12
    assert resident_memory(plan, 0).optimizer == 0
    saved = chain_plan(4, 1, 2, num_replicas=2, partition=2, offload_state=True, options=ENDS)
    assert len(found(saved, Opcode.SAVE)) == 4
    assert not found(saved, Opcode.EVICT)


@pytest.mark.parametrize(("partition", "tail"), [(0, 2.0), (1, 3.0), (2, 2.0), (3, 1.0)])
def test_seconds_behind_the_last_backward(partition: int, tail: float) -> None:
    """A reduction or a gather moves half the bytes once, in a second; an all-reduce twice."""
    cluster = chain_cluster(2, bandwidth=FLOAT * 1000 / 2)
    plan = chain_plan(
        4, 1, 4, cluster=cluster, num_elements=1000, num_replicas=2, partition=partition
    )
    assert simulate(plan).tail_seconds == pytest.approx(tail)


@pytest.mark.parametrize("partition", [1, 2])
def test_rule_6_updated_parts_are_gathered_before_the_step_ends(partition: int) -> None:
    plan = chain_plan(num_replicas=2, partition=partition)
    gather, update = find(plan, 0, Opcode.GATHER), find(plan, 0, Opcode.UPDATE)
    lacking = dropped(plan, 0, gather)
    assert broken_rules(lacking) == {6}
    assert "stage.2 is gathered after its update 0 times instead of 1" in counterexample(lacking, 6)
    assert broken_rules(repeated(plan, 0, gather)) >= {6}
    assert 5 in broken_rules(moved(plan, 0, gather, update))
    # The count is right, but one unit is gathered twice and another never.
    unit = plan.programs[0][find(plan, 0, Opcode.GATHER, 1)]
    twice = changed(plan, 0, gather, unit=unit.unit, reads=unit.reads, writes=unit.writes)
    assert {5, 6} <= broken_rules(twice)


def test_rule_5_weights_updated_in_part_are_not_read() -> None:
    plan = chain_plan(2, 1, 2, num_replicas=2, partition=1)
    update = find(plan, 0, Opcode.UPDATE, unit="stage.1")
    gather = find(plan, 0, Opcode.GATHER, unit="stage.1")
    reader = replace(
        plan.programs[0][find(plan, 0, Opcode.FORWARD, stage=1, micro_batch=1)],
        opcode=Opcode.RECOMPUTE,
        writes=("saved:1.1",),
    )
    program = list(plan.programs[0])
    program.insert(gather, reader)
    assert update < gather
    shown = counterexample(replace(plan, programs=(tuple(program),)), 5)
    assert "finds weights that are updated in this replica's part alone" in shown


def test_rule_5_a_shard_stays_with_its_weights() -> None:
    plan = chain_plan(2, 1, 1, num_replicas=2, partition=2, offload_state=True)
    release = find(plan, 0, Opcode.RELEASE)
    shard = (f"shard:{plan.programs[0][release].unit}",)
    assert 5 in broken_rules(changed(plan, 0, release, reads=shard, writes=shard))


def test_rule_8_counts_gathers_of_updates_as_one() -> None:
    plan = chain_plan(num_replicas=2, partition=1)
    assert 8 in broken_rules(repeated(plan, 0, find(plan, 0, Opcode.GATHER)))


def whole_gradients(run: Run, step: int) -> dict[str, Tensor]:
    """Of each parameter, from the parts of all replicas; every replica's where they are whole."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, first, values in run.steps[step].gradients:
        parts.setdefault(name, {})[first] = values.reshape(-1)
    return {
        name: torch.cat([found[first] for first in sorted(found)]) for name, found in parts.items()
    }


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one rank": (CHAIN, {"recompute": True}),
    "tied on two ranks": (TIED, {"num_pipeline_ranks": 2}),
    "ends": (TIED, {"num_pipeline_ranks": 2, "options": ENDS}),
    "offloaded": (CHAIN, {"num_pipeline_ranks": 2, "offload_state": True}),
    "offloaded, ends": (TIED, {"offload_state": True, "options": ENDS}),
    "1f1b": (CHAIN, {"num_pipeline_ranks": 2, "schedule": Schedule.ONE_F_ONE_B}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_level_trains_alike_on_two_replicas(name: str) -> None:
    """Sums over replicas are in one order, so losses, gradients and weights are equal, bit by bit.

    The second step's losses show what the first one's update and gather left.
    """
    model_file, choices = CASES[name]
    one_stage = choices.get("schedule") is Schedule.ONE_F_ONE_B
    num_layers = 5 if model_file is CHAIN else 4
    boundaries = (0, 2, num_layers) if one_stage else (0, 1, 2, 3, num_layers)
    runs = []
    for level in range(4):
        made = plan_of(model_file, boundaries, num_replicas=2, partition=level, **choices)
        assert made.partition == level
        runs.append(train_by_plan(model_file, made, NUM_STEPS))
    for level, run in enumerate(runs[1:], 1):
        for step in range(NUM_STEPS):
            mine, plain = run.steps[step].losses, runs[0].steps[step].losses
            assert mine.keys() == plain.keys()
            assert all(torch.equal(mine[key], plain[key]) for key in plain), (level, step)
            gradients, wanted = whole_gradients(run, step), whole_gradients(runs[0], step)
            assert gradients.keys() == wanted.keys()
            for key, gradient in gradients.items():
                assert torch.equal(gradient, wanted[key]), (level, step, key)
        for key, value in run.state.items():
            assert torch.equal(value, runs[0].state[key]), (level, key)


@pytest.mark.parametrize("partition", [1, 2])
def test_a_reduction_in_parts(partition: int) -> None:
    """Plain accumulation with one buffer: level 2 reduces each micro-batch, level 1 the sum."""
    made = plan_of(
        CHAIN,
        (0, 2, 5),
        num_replicas=2,
        partition=partition,
        schedule=Schedule.PLAIN,
        num_gradient_buffers=1,
    )
    reductions = Counter(i.unit for i in made.programs[0] if i.opcode is Opcode.REDUCE)
    assert set(reductions.values()) == {3 if partition == 2 else 1}
    assert_same(CHAIN, made, 1e-6)


def test_traffic_of_a_step_is_a_reduction_and_a_gather_of_each_stage() -> None:
    """As much in all as the one all-reduce of replicas that hold everything."""
    moved_bytes = []
    for level in range(3):
        made = plan_of(CHAIN, (0, 1, 2, 3, 5), num_replicas=2, partition=level)
        (mine, _) = train_by_plan(CHAIN, made, num_steps=1).traffic
        assert mine.num_calls["reduce"] == 4
        assert mine.num_calls.get("gather", 0) == (4 if level else 0)
        moved_bytes.append(mine.num_bytes["reduce"] + mine.num_bytes.get("gather", 0))
    whole, optimizer, gradients = moved_bytes
    assert gradients == whole
    assert optimizer == 1.5 * whole


@pytest.mark.parametrize("partition", [1, 2])
def test_the_replicas_hold_parts_of_moments_and_whole_weights(partition: int) -> None:
    made = plan_of(CHAIN, (0, 2, 5), num_replicas=2, partition=partition)
    batch = CHAIN.example_batch(made.replica_batch_size)

    def run(executor: Executor) -> tuple[int, dict[str, Tensor]]:
        executor.step(batch)
        held = sum(tensor.nbytes for tensor in executor.resident_tensors())
        return held, executor.state_dict()

    results = on_every_rank(made, CHAIN, run)
    planned = resident_memory(made, 0).total_bytes
    whole = resident_memory(plan_of(CHAIN, (0, 2, 5), num_replicas=2, partition=0), 0).total_bytes
    counters = FLOAT * len(made.parameters)  # an optimizer's count of steps for each
    for held, state in results:
        # Moments have no gaps, as the parts of aligned parameters have.
        assert 0.95 * planned < held <= planned + counters < 0.85 * whole
        assert all(torch.equal(value, results[0][1][key]) for key, value in state.items())


@pytest.mark.parametrize("partition", [1, 2])
def test_measured_peaks_keep_the_bound(partition: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = model_of(
        lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))), square, vectors
    )
    made = plan_with_updates(model_file, 2, recompute=False, num_replicas=2, partition=partition)
    assert_bounded(made, model_file, monkeypatch)
