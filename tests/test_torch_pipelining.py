"""Exported schedules before someone else's judge: torch's own validation, lowering and dry run."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile
from torch.distributed.pipelining.schedules import (
    REDUCE_GRAD,
    RESHARD,
    UNSHARD,
    _Action,
    _PipelineScheduleRuntime,
    _simulate_comms_compute,
    _validate_schedule,
)
from torch_schedules import load_csv

from planner.errors import UsageError
from planner.export.torch_csv import CsvFormat, csv_notes, print_csv, torch_actions
from planner.lower import lower
from planner.plan.types import Plan, PlanOptions
from planner.schedules import Schedule

FAMILIES = [
    # schedule, pipeline ranks, stages, micro-batches, group size
    (Schedule.LAYERED, 1, 1, 1, 0),
    (Schedule.LAYERED, 1, 4, 3, 0),
    (Schedule.LAYERED, 2, 4, 1, 0),
    (Schedule.LAYERED, 2, 5, 3, 0),
    (Schedule.LAYERED, 4, 8, 4, 0),
    (Schedule.LAYERED, 3, 9, 7, 0),
    (Schedule.GPIPE, 2, 2, 1, 0),
    (Schedule.GPIPE, 4, 4, 8, 0),
    (Schedule.ONE_F_ONE_B, 4, 4, 8, 0),
    (Schedule.ONE_F_ONE_B, 4, 4, 2, 0),
    (Schedule.INTERLEAVED, 4, 8, 8, 0),
    (Schedule.INTERLEAVED, 2, 6, 4, 0),
    (Schedule.HYBRID, 2, 4, 6, 3),
    (Schedule.HYBRID, 4, 16, 8, 8),
    (Schedule.ZERO_BUBBLE, 2, 2, 1, 0),
    (Schedule.ZERO_BUBBLE, 4, 4, 8, 0),
]


def plan_of(
    schedule: Schedule,
    num_ranks: int,
    num_stages: int,
    num_micro_batches: int,
    group_size: int = 0,
    *,
    skips: tuple[tuple[int, int], ...] = (),
    frozen: tuple[str, ...] = (),
    num_replicas: int = 1,
    recompute: bool = False,
) -> Plan:
    """A chain on links that cost something, so that transfers take their places in time.

    The gradient of tensors that are `frozen` goes nowhere.
    """
    graph = chain_graph(num_stages, skips=skips, width=4)
    tensors = (replace(t, requires_grad=t.name not in frozen) for t in graph.tensors)
    graph = replace(graph, tensors=tuple(tensors))
    placement = chain_placement(
        num_stages,
        num_ranks,
        num_micro_batches,
        num_replicas=num_replicas,
        partition=3 if num_replicas > 1 else 0,
        recompute=recompute,
    )
    return lower(
        graph,
        chain_profile(graph),
        chain_cluster(num_ranks * num_replicas, bandwidth=100.0, latency_seconds=0.05),
        replace(placement, schedule=schedule, group_size=group_size),
        PlanOptions(),
    )


def loaded(plan: Plan, csv_format: CsvFormat, folder: Path) -> _PipelineScheduleRuntime:
    path = folder / f"{csv_format.value}.csv"
    path.write_text(print_csv(plan, csv_format))
    return load_csv(
        str(path),
        csv_format.value,
        num_ranks=plan.num_pipeline_ranks,
        local_stages=[stage.index for stage in plan.stages if stage.rank == 0],
        num_stages=plan.num_stages,
        num_micro_batches=plan.num_micro_batches,
    )


def transfers(rows: dict[int, list[_Action]]) -> dict[int, list[_Action]]:
    """SEND and RECV of each rank."""
    return {
        rank: [a for a in row if a.computation_type.value[:5] in ("SEND_", "RECV_")]
        for rank, row in rows.items()
    }


@pytest.mark.parametrize("csv_format", CsvFormat)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_torch_validates_loads_and_dry_runs_it(
    family: tuple[Schedule, int, int, int, int], csv_format: CsvFormat, tmp_path: Path
) -> None:
    plan = plan_of(*family)
    actions = {
        rank: [_Action.from_str(cell) for cell in row]
        for rank, row in enumerate(torch_actions(plan, csv_format))
    }
    found = _validate_schedule(
        actions, plan.num_pipeline_ranks, plan.num_stages, plan.num_micro_batches
    )
    ranks = {stage.index: stage.rank for stage in plan.stages}
    assert found == ranks
    runtime = loaded(plan, csv_format, tmp_path)
    # torch's dry run knows compute and transfers only.
    rows = {
        rank: [a for a in row if a.computation_type not in (UNSHARD, RESHARD, REDUCE_GRAD)]
        for rank, row in runtime.pipeline_order_with_comms.items()
    }
    _simulate_comms_compute(rows, lambda stage: ranks[stage], plan.num_stages)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_both_forms_hold_the_same_compute_and_the_transfers_that_torch_would_add(
    family: tuple[Schedule, int, int, int, int], tmp_path: Path
) -> None:
    assert_forms_agree(plan_of(*family), tmp_path)


def test_torch_sends_a_gradient_where_we_do_not(tmp_path: Path) -> None:
    plan = plan_of(Schedule.LAYERED, 2, 4, 3, frozen=("h_0", "h_2"))
    assert not any(b.startswith("gradient:h_0") for p in plan.programs for i in p for b in i.reads)
    assert_forms_agree(plan, tmp_path)


def assert_forms_agree(plan: Plan, tmp_path: Path) -> None:
    only = torch_actions(plan, CsvFormat.COMPUTE_ONLY)
    comms = torch_actions(plan, CsvFormat.COMPUTE_COMMS)
    for compute, row in zip(only, comms, strict=True):
        assert [cell for cell in row if cell in set(compute)] == compute
    mine = transfers(loaded(plan, CsvFormat.COMPUTE_COMMS, tmp_path).pipeline_order_with_comms)
    theirs = transfers(loaded(plan, CsvFormat.COMPUTE_ONLY, tmp_path).pipeline_order_with_comms)
    assert {r: sorted(row) for r, row in mine.items()} == {
        r: sorted(row) for r, row in theirs.items()
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_two_ranks_agree_on_the_order_of_all_transfers_between_them(
    family: tuple[Schedule, int, int, int, int],
) -> None:
    plan = plan_of(*family)
    ranks = [stage.rank for stage in plan.stages]
    queues: dict[tuple[int, int], list[tuple[str, int, int | None]]] = defaultdict(list)
    for rank, row in enumerate(torch_actions(plan, CsvFormat.COMPUTE_COMMS)):
        for cell in row:
            action = _Action.from_str(cell)
            kind = action.computation_type.value
            if kind[:5] not in ("SEND_", "RECV_"):
                continue
            is_send, letter = kind.startswith("SEND"), kind[-1]
            step = 1 if is_send is (letter == "F") else -1
            sender = action.stage_index if is_send else action.stage_index + step
            queues[rank, ranks[action.stage_index + step]].append(
                (letter, sender, action.microbatch_index)
            )
    for (rank, peer), queue in queues.items():
        assert rank != peer
        assert queue == queues[peer, rank]


def test_gathers_become_unshard_and_reshard_around_each_use() -> None:
    plan = plan_of(Schedule.LAYERED, 2, 6, 3, num_replicas=2)
    for row in torch_actions(plan, CsvFormat.COMPUTE_COMMS):
        unsharded: set[int] = set()
        num_gathers = 0
        for cell in row:
            action = _Action.from_str(cell)
            match action.computation_type:
                case kind if kind is UNSHARD:
                    assert action.stage_index not in unsharded
                    unsharded.add(action.stage_index)
                    num_gathers += 1
                case kind if kind is RESHARD:
                    unsharded.remove(action.stage_index)
                case _ if action.is_compute_op:
                    assert action.stage_index in unsharded, cell
        assert not unsharded
        assert num_gathers == 4  # three stages and two buffers: the last two serve both passes
        assert [cell for cell in row if "REDUCE" in cell] == [
            f"{stage.index}REDUCE_GRAD"
            for stage in reversed(plan.stages)
            if stage.rank == int(row[0][0]) % 2
        ]


def test_recomputation_is_left_out_and_told() -> None:
    plan = plan_of(Schedule.LAYERED, 2, 4, 3, recompute=True)
    plain = plan_of(Schedule.LAYERED, 2, 4, 3)
    for csv_format in CsvFormat:
        assert any("RECOMPUTE" in note for note in csv_notes(plan, csv_format))
        assert not any("RECOMPUTE" in note for note in csv_notes(plain, csv_format))
    wanted = print_csv(plain, CsvFormat.COMPUTE_ONLY)
    assert print_csv(plan, CsvFormat.COMPUTE_ONLY) == wanted


@pytest.mark.parametrize("csv_format", CsvFormat)
def test_skip_connections_are_refused(csv_format: CsvFormat) -> None:
    plan = plan_of(Schedule.LAYERED, 2, 4, 2, skips=((0, 2),))
    with pytest.raises(UsageError, match="stage 2 reads skip_0_2 from stage 0"):
        print_csv(plan, csv_format)
    near = plan_of(Schedule.LAYERED, 2, 4, 2, skips=((0, 1),))
    assert print_csv(near, csv_format).count("SEND_F") == (
        0 if csv_format is CsvFormat.COMPUTE_ONLY else 3 * 2
    )


def test_a_plan_without_backward_is_refused() -> None:
    plan = plan_of(Schedule.LAYERED, 2, 4, 2)
    with pytest.raises(UsageError, match="without backward"):
        print_csv(replace(plan, schedule=Schedule.FORWARD), CsvFormat.COMPUTE_ONLY)
