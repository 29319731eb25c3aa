"""Stages on any ranks: not s mod P, neighbours on one rank, tied ends together."""

import random
from typing import Any

import pytest
import torch
from comparison import compare
from models import own
from planned import assert_same, model_of, plan_of
from small_plans import small_plan
from synthetic import chain_plan
from torch import Tensor, nn

from planner.check import check
from planner.errors import UsageError
from planner.plan.types import Opcode
from planner.schedules import Schedule


class Language(nn.Module):
    """An embedding, blocks, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)]
        )
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        output: Tensor = self.head(x)
        return output


def tokens(batch_size: int) -> dict[str, Tensor]:
    found = torch.randint(0, 16, (batch_size, 5))
    return {"tokens": found[:, :-1], "next": found[:, 1:]}


def next_token(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["next"].flatten())


LANGUAGE = model_of(Language, next_token, tokens)
UNET = model_of(own.UNet, own.square, own.vectors)


@pytest.mark.parametrize(
    "choices",
    [
        {"stage_ranks": (0, 1, 1, 1, 0)},
        {"stage_ranks": (1, 0, 0, 0, 1), "recompute": True},
        {"stage_ranks": (0, 1, 2, 1, 0), "num_pipeline_ranks": 3},
        {"stage_ranks": (0, 1, 1, 1, 0), "schedule": Schedule.PLAIN},
        {"stage_ranks": (0, 1, 1, 1, 0), "offload_state": True, "offload_inputs": True},
    ],
)
def test_tied_ends_on_one_rank_are_bitwise(choices: dict[str, Any]) -> None:
    """No REDUCE_TIED, and their gradients are added as plain accumulation adds them."""
    made = plan_of(LANGUAGE, (0, 1, 2, 3, 4, 5), **{"num_pipeline_ranks": 2, **choices})
    tied = [unit for unit in made.units if len(unit.stages) > 1]
    assert [(unit.exact, len(unit.ranks)) for unit in tied] == [(True, 1)]
    assert not [i for p in made.programs for i in p if i.opcode is Opcode.REDUCE_TIED]
    assert_same(LANGUAGE, made)


@pytest.mark.parametrize(
    ("stage_ranks", "recompute"),
    [((0, 0, 1, 1), False), ((0, 1, 1, 0), True), ((1, 1, 1, 0), False), ((1, 0, 2, 0), True)],
)
def test_skips_between_stages_on_any_ranks_are_bitwise(
    stage_ranks: tuple[int, ...], recompute: bool
) -> None:
    made = plan_of(
        UNET,
        (0, 1, 3, 4, 6),
        num_pipeline_ranks=max(stage_ranks) + 1,
        stage_ranks=stage_ranks,
        recompute=recompute,
    )
    assert_same(UNET, made)


@pytest.mark.parametrize("partition", [0, 1, 3])
def test_with_replicas(partition: int) -> None:
    made = plan_of(
        LANGUAGE,
        (0, 1, 2, 3, 4, 5),
        num_pipeline_ranks=2,
        num_replicas=2,
        stage_ranks=(0, 0, 1, 1, 0),
        partition=partition,
    )
    assert_same(LANGUAGE, made, 1e-6)


def test_neighbours_on_one_rank_hand_over_without_a_transfer() -> None:
    def transfers(*stage_ranks: int) -> int:
        made = chain_plan(4, 2, 3, stage_ranks=stage_ranks)
        return sum(i.opcode is Opcode.SEND for program in made.programs for i in program)

    assert transfers(0, 0, 1, 1) == 2 * 3  # one cut, forward and back, three micro-batches
    assert transfers(0, 1, 1, 0) == 2 * transfers(0, 0, 1, 1)
    assert transfers(0, 1, 0, 1) == 3 * transfers(0, 0, 1, 1)


def test_random_assignments_pass_both_judges() -> None:
    num_others = 0
    for seed in range(80):
        plan = small_plan(random.Random(seed), max_instructions=60)
        ranks = [stage.rank for stage in plan.stages]
        if ranks == [stage % plan.num_pipeline_ranks for stage in range(len(ranks))]:
            continue
        found = compare(plan)
        assert found.accepted, found.explain()
        assert found.agrees, found.explain()
        num_others += 1
    assert num_others > 5


def test_long_pipelines_on_random_ranks_do_not_lock() -> None:
    for seed in range(20):
        chooser = random.Random(seed)
        num_ranks = chooser.randint(2, 6)
        ranks = [*range(num_ranks), *chooser.choices(range(num_ranks), k=chooser.randint(0, 14))]
        chooser.shuffle(ranks)
        skips = {tuple(sorted(chooser.sample(range(len(ranks)), 2))) for _ in range(3)}
        plan = chain_plan(
            len(ranks),
            num_ranks,
            chooser.randint(1, 5),
            stage_ranks=tuple(ranks),
            skips=[(one, two) for one, two in sorted(skips) if two - one > 1],
            tied=[(0, len(ranks) - 1)],
            recompute=chooser.random() < 0.5,
            offload_inputs=chooser.random() < 0.5,
        )
        assert check(plan).passed


@pytest.mark.parametrize(
    ("stage_ranks", "message"),
    [
        ((0, 0, 0, 0), "pipeline rank 1 of 2 has no stage"),
        ((0, 1, 2, 0), "pipeline rank 2 of 2 has a stage, but is none of them"),
    ],
)
def test_idle_and_unknown_ranks_are_refused(stage_ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chain_plan(4, 2, 3, stage_ranks=stage_ranks)
    assert "stage" in (caught.value.hint or "")


def test_schedules_with_a_place_for_each_stage_refuse_others() -> None:
    for schedule in (Schedule.INTERLEAVED, Schedule.ONE_F_ONE_B):
        with pytest.raises(UsageError, match="stage s on rank s"):
            chain_plan(4, 2, 4, stage_ranks=(0, 1, 1, 0), schedule=schedule)
