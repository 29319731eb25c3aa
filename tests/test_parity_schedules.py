"""Every schedule, and state and inputs in host memory, train as plain accumulation does.

With one replica bitwise: losses, first gradients, and what three steps leave. The exception is a
weight tied between pipeline ranks, and two replicas: there additions are in another order.
"""

from typing import Any

import pytest
from models import own
from planned import Chain, assert_same, model_of, plan_of, traced
from torch import nn

from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule

TOLERANCE = 1e-6


class Tied(own.Tied):
    """With more layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))


MODELS = {
    "mlp": model_of(lambda: Chain(block, 5)),
    "unet": model_of(own.UNet, own.square, own.vectors),
    "tied": model_of(Tied, own.classes, own.tokens),
    "conv": model_of(own.ConvNet, own.classes, own.images),
}
ONE_STAGE_PER_RANK = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)
SCHEDULES = (
    *ONE_STAGE_PER_RANK, Schedule.PLAIN, Schedule.INTERLEAVED, Schedule.HYBRID, Schedule.LAYERED
)  # fmt: skip


def plan(name: str, schedule: Schedule, *, num_pipeline_ranks: int = 2, **choices: Any) -> Plan:
    num_layers = len(traced(MODELS[name]).layer_graph(2).layers)
    num_stages = num_pipeline_ranks * (1 if schedule in ONE_STAGE_PER_RANK else 2)
    cuts = [round(s * num_layers / num_stages) for s in range(num_stages + 1)]
    if schedule is Schedule.HYBRID:
        choices["group_size"] = 2
    return plan_of(
        MODELS[name],
        tuple(cuts),
        num_pipeline_ranks=num_pipeline_ranks,
        num_micro_batches=4,
        schedule=schedule,
        **choices,
    )


def tolerance(made: Plan) -> float:
    apart = made.num_replicas > 1 or any(len(unit.ranks) > 1 for unit in made.units)
    return TOLERANCE if apart else 0.0


def opcodes(made: Plan) -> set[Opcode]:
    return {instruction.opcode for program in made.programs for instruction in program}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp", "unet", "tied"])
def test_one_replica(name: str, schedule: Schedule, recompute: bool) -> None:
    made = plan(name, schedule, recompute=recompute)
    assert (Opcode.BACKWARD_WEIGHT in opcodes(made)) == (schedule is Schedule.ZERO_BUBBLE)
    assert_same(MODELS[name], made, tolerance(made))


@pytest.mark.parametrize("schedule", [Schedule.PLAIN, Schedule.HYBRID, Schedule.LAYERED])
def test_one_rank_adds_tied_gradients_in_the_plain_order(schedule: Schedule) -> None:
    made = plan("tied", schedule, num_pipeline_ranks=1)
    assert any(unit.exact for unit in made.units)
    assert_same(MODELS["tied"], made)


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["unet", "tied"])
def test_two_replicas(name: str, schedule: Schedule, partition: int) -> None:
    made = plan(name, schedule, num_replicas=2, partition=partition)
    assert_same(MODELS[name], made, TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "schedule", [Schedule.LAYERED, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE, Schedule.PLAIN]
)
@pytest.mark.parametrize("name", ["mlp", "unet", "tied"])
def test_state_in_host_memory(name: str, schedule: Schedule, recompute: bool) -> None:
    made = plan(name, schedule, offload_state=True, recompute=recompute)
    assert {Opcode.FETCH, Opcode.EVICT, Opcode.GATHER} <= opcodes(made)
    assert_same(MODELS[name], made, tolerance(made))


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.INTERLEAVED])
def test_state_of_two_replicas_in_host_memory(schedule: Schedule, partition: int) -> None:
    made = plan("tied", schedule, num_replicas=2, partition=partition, offload_state=True)
    assert_same(MODELS["tied"], made, TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_pipeline_ranks", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "unet", "tied"])
def test_inputs_in_host_memory(name: str, num_pipeline_ranks: int, recompute: bool) -> None:
    made = plan(
        name,
        Schedule.LAYERED,
        num_pipeline_ranks=num_pipeline_ranks,
        offload_inputs=True,
        recompute=recompute,
    )
    moved = {
        name
        for program in made.programs
        for instruction in program
        if instruction.opcode is Opcode.EVICT
        for name in instruction.reads
    }
    assert moved or num_pipeline_ranks > 1
    assert_same(MODELS[name], made, tolerance(made))


@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.ONE_F_ONE_B])
def test_statistics_of_batches_are_those_of_plain_training(schedule: Schedule) -> None:
    made = plan("conv", schedule, recompute=True, offload_state=True, offload_inputs=True)
    assert_same(MODELS["conv"], made)
