"""Predicted seconds of a stage: its layers, and the transfers that a CPU does itself."""

from dataclasses import replace

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.cluster.types import Cluster
from planner.lower import lower
from planner.plan.types import Plan, PlanOptions


def lowered(num_pipeline_ranks: int, message_seconds: float) -> Plan:
    graph = chain_graph(4, skips=[(0, 3)])
    cluster = chain_cluster(num_pipeline_ranks)
    (host,) = cluster.hosts
    device = replace(host.device, message_seconds=message_seconds)
    cluster = Cluster(
        name="busy",
        hosts=(replace(host, device=device),),
        network=cluster.network,
        backend="gloo",
        provenance="made for a test",
    )
    placement = chain_placement(4, num_pipeline_ranks, 2)
    return lower(graph, chain_profile(graph), cluster, placement, PlanOptions())


@pytest.mark.parametrize(
    ("num_pipeline_ranks", "num_messages"),
    [(1, [0, 0, 0, 0]), (2, [2, 2, 2, 2]), (4, [2, 2, 2, 2])],
)
def test_a_stage_pays_for_each_message_it_sends_or_receives(
    num_pipeline_ranks: int, num_messages: list[int]
) -> None:
    """With a skip from the first stage to the last: two tensors leave the one, two reach the
    other, and those between pass one on."""
    plan = lowered(num_pipeline_ranks, message_seconds=0.125)
    assert [s.forward_seconds for s in plan.stages] == [1 + 0.125 * n for n in num_messages]
    assert [s.backward_seconds for s in plan.stages] == [2 + 0.125 * n for n in num_messages]
    sent = sum(i.opcode == "SEND" for program in plan.programs for i in program)
    assert 2 * sent == 2 * 2 * sum(num_messages)  # each has two ends; two passes, two micro-batches


def test_nothing_is_paid_where_a_copy_engine_moves_the_bytes() -> None:
    plan = lowered(4, message_seconds=0.0)
    assert [s.forward_seconds for s in plan.stages] == [1.0] * 4


def test_what_recompute_saves_is_not_counted_in_its_peak_again() -> None:
    graph = chain_graph(2)
    profile = chain_profile(graph, saved_bytes=1000, transient_bytes=5000)
    placement = chain_placement(1, 1, 1, layers_per_stage=2, recompute=True)
    (stage,) = lower(graph, profile, chain_cluster(1), placement, PlanOptions()).stages
    # The second layer begins with the tensor of 4 bytes between them.
    assert stage.forward_transient_bytes == 5004
    # Its peak stands on what the first has kept, of 1000 + 1000 and the tensor between them that
    # are saved in the end.
    assert stage.saved_bytes == 2004
    assert stage.recompute_transient_bytes == 1004 + 5000 - 2004
    kept = chain_placement(1, 1, 1, layers_per_stage=2, recompute=False)
    (stage,) = lower(graph, profile, chain_cluster(1), kept, PlanOptions()).stages
    assert (stage.forward_transient_bytes, stage.recompute_transient_bytes) == (4000, 0)
