"""The main test: training by a plan gives what plain accumulation gives.

One replica: losses, every gradient and every parameter after three AdamW steps (two, where there
is one micro-batch, or five) are `torch.equal` to the user's eager module's, in every layout.
Exceptions, because additions happen in another order: a weight tied between two pipeline ranks, and
two replicas; there gradients at equal weights and the parameters as a whole agree within 1e-6
relative RMS. (AdamW divides by the gradient's own size, so elements whose true gradient is zero,
like a key bias in attention, are noise in either run: they are held to the tolerance together with
the rest, not alone.)
"""

import functools

import pytest
import torch
from training import (
    NUM_STEPS,
    Run,
    even_plan,
    example,
    plain_part,
    relative_rms,
    train_by_plan,
    train_plainly,
)

from planner.plan.types import Plan

TOLERANCE = 1e-6
MODELS = ("gpt", "resnet", "unet", "mlp")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def plain(
    name: str,
    num_replicas: int,
    num_micro_batches: int,
    micro_batch_size: int,
    num_steps: int = NUM_STEPS,
) -> Run:
    plan = even_plan(
        name,
        num_replicas=num_replicas,
        num_micro_batches=num_micro_batches,
        micro_batch_size=micro_batch_size,
    )
    return train_plainly(example(name)[0], plan, num_steps)


def assert_bitwise(mine: Run, expected: Run) -> None:
    for step, (got, want) in enumerate(zip(mine.steps, expected.steps, strict=True)):
        assert got.losses.keys() == want.losses.keys()
        for key, loss in want.losses.items():
            assert torch.equal(got.losses[key], loss), (step, key)
        gradients = {name: values for name, _, values in got.gradients}
        assert gradients.keys() == {name for name, _, _ in want.gradients}
        for name, _, values in want.gradients:
            assert torch.equal(gradients[name].view(values.shape), values), (step, name)
    assert mine.state.keys() <= expected.state.keys()
    for name, value in mine.state.items():
        assert torch.equal(value, expected.state[name]), name


def assert_close(mine: Run, expected: Run, plan: Plan) -> None:
    """First-step gradients of every parameter, and all parameters afterwards, within 1e-6."""
    for key, loss in expected.steps[0].losses.items():
        assert torch.equal(mine.steps[0].losses[key], loss), key
    covered: dict[str, int] = {}
    for name, first, values in mine.steps[0].gradients:
        flat = values.reshape(-1)
        want = plain_part(expected, 0, name, first, flat.numel())
        assert relative_rms(flat, want) <= TOLERANCE, name
        covered[name] = covered.get(name, 0) + flat.numel()
    for name, _, values in expected.steps[0].gradients:
        assert covered[name] >= values.numel(), name
    names = [spec.name for spec in plan.parameters]
    assert (
        relative_rms(
            torch.cat([mine.state[name].reshape(-1) for name in names]),
            torch.cat([expected.state[name].reshape(-1) for name in names]),
        )
        <= TOLERANCE
    )


@pytest.mark.parametrize("stages_per_rank", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("num_pipeline_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", MODELS)
def test_one_replica_is_bitwise(name: str, num_pipeline_ranks: int, stages_per_rank: int) -> None:
    for num_micro_batches in (1, 2, 5):
        num_steps = NUM_STEPS if num_micro_batches == 2 else 2
        expected = plain(name, 1, num_micro_batches, 2, num_steps)
        for recompute in (False, True):
            plan = even_plan(
                name,
                num_pipeline_ranks=num_pipeline_ranks,
                stages_per_rank=stages_per_rank,
                num_micro_batches=num_micro_batches,
                recompute=recompute,
            )
            mine = train_by_plan(example(name)[0], plan, num_steps)
            if any(len(unit.ranks) > 1 for unit in plan.units):
                assert name == "gpt"
                assert_close(mine, expected, plan)
            else:
                assert_bitwise(mine, expected)


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("num_pipeline_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", MODELS)
def test_two_replicas_are_close(name: str, num_pipeline_ranks: int, partition: int) -> None:
    for stages_per_rank, num_micro_batches, recompute in (
        (1, 1, False),
        (2, 2, True),
        (3, 2, False),
    ):
        plan = even_plan(
            name,
            num_replicas=2,
            num_pipeline_ranks=num_pipeline_ranks,
            stages_per_rank=stages_per_rank,
            num_micro_batches=num_micro_batches,
            micro_batch_size=4,
            partition=partition,
            recompute=recompute,
        )
        mine = train_by_plan(example(name)[0], plan)
        assert_close(mine, plain(name, 2, num_micro_batches, 4), plan)


@pytest.mark.parametrize("num_weight_buffers", [1, 2, 3])
def test_gathered_weights_may_move_between_forward_and_backward(num_weight_buffers: int) -> None:
    plan = even_plan(
        "gpt",
        num_replicas=2,
        stages_per_rank=4,
        num_micro_batches=2,
        micro_batch_size=4,
        partition=3,
        num_weight_buffers=num_weight_buffers,
    )
    assert_close(train_by_plan(example("gpt")[0], plan), plain("gpt", 2, 2, 4), plan)


def test_traffic_of_the_state_does_not_grow_with_micro_batches() -> None:
    """Counted where it leaves the rank: a gather per stage and pass, one reduction per stage."""
    counts = set()
    for num_micro_batches in (1, 2, 5):
        plan = even_plan(
            "mlp",
            num_replicas=2,
            stages_per_rank=5,
            num_micro_batches=num_micro_batches,
            partition=3,
        )
        (mine, _) = train_by_plan(example("mlp")[0], plan, num_steps=1).traffic
        counts.add(
            (
                mine.num_calls["gather"],
                mine.num_calls["reduce"],
                mine.num_bytes["gather"],
                mine.num_bytes["reduce"],
            )
        )
    ((gathers, reductions, _, reduced_bytes),) = counts
    assert gathers == 2 * 5 - 2  # both passes, less the two still in their buffers
    assert reductions == 5
    padded = sum(-(-unit.num_elements // 2) for unit in plan.units)
    assert reduced_bytes == 4 * padded
