"""CHECK_FINITE and CLIP where another rank is late, or dies: no rank waits for ever."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from planned import Chain, model_of, plan_of
from stepping import batches, on_every_rank
from torch import Tensor, nn

from planner.errors import DeadlineError, PeerLostError
from planner.plan.types import PlanOptions
from runtime.executor import Executor


def errors_of_ranks(happens: Callable[[], None], **options: Any) -> dict[int, BaseException]:
    """Of a step of two ranks: `happens` is called in rank 0's backward, when 1 has done its own."""

    class Troubled(nn.Linear):
        is_ready = False

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            output = super().forward(input)
            if self.is_ready:
                output.register_hook(lambda _: happens())
            return output

    model_file = model_of(lambda: Chain(lambda: Troubled(8, 8), 1))
    made = plan_of(
        model_file,
        (0, 1, 2),
        num_pipeline_ranks=2,
        num_micro_batches=1,
        options=PlanOptions(deadline_seconds=0.5, **options),
    )
    (given,) = batches(made, model_file, 0)
    found: dict[int, BaseException] = {}

    def run(executor: Executor) -> None:
        executor._model.get_submodule("layers.0").is_ready = True  # type: ignore[assignment]
        try:
            executor.step(given)
        except BaseException as error:
            found[executor.rank] = error
            raise

    with pytest.raises(BaseException):  # noqa: B017, PT011
        on_every_rank(made, model_file, run)
    return found


ENDS = [({"check_finite": True}, "CHECK_FINITE (finite)"), ({"clip_norm": 1.0}, "CLIP (scale)")]


@pytest.mark.parametrize(("options", "words"), ENDS)
def test_a_late_rank_is_named(options: dict[str, Any], words: str) -> None:
    never = threading.Event()
    found = errors_of_ranks(lambda: never.wait(2), **options)
    assert isinstance(found[1], DeadlineError)
    assert str(found[1]).startswith(
        f"rank 1 (pipeline rank 1, replica 0): {words}: no answer from "
        "rank 0 (pipeline rank 0, replica 0) within the deadline of 0.5 s"
    )


@pytest.mark.parametrize(("options", "words"), ENDS)
def test_a_rank_that_fails_ends_the_others(options: dict[str, Any], words: str) -> None:
    def fail() -> None:
        raise ArithmeticError("teapot")

    found = errors_of_ranks(fail, **options)
    assert isinstance(found[0], ArithmeticError)
    assert isinstance(found[1], PeerLostError)
    assert f"{words}: the run was ended by another rank: teapot" in str(found[1])
