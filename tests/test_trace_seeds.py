"""A forward that sets torch's generator is refused: keys would depend on where a plan cuts."""

from collections.abc import Callable

import pytest
import torch
from planned import Chain, assert_same, model_of, plan_of, traced
from torch import Tensor, nn

from planner.errors import TraceError


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.functional.dropout(x)


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return nn.functional.dropout(x)


class Inside(nn.Linear):
    """A layer that treats its input in some way."""

    def __init__(self, treat: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8, 8)
        self.treat = treat

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.treat(x))


class Between(Chain):
    """A model that does so before its layers."""

    treat: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(type(self).treat(x))


class BetweenSeeded(Between):
    treat = staticmethod(seeded)


class BetweenForked(Between):
    treat = staticmethod(forked)


@pytest.mark.parametrize("treat", [seeded, forked])
def test_a_layer_that_sets_the_generator_is_refused(treat: Callable[[Tensor], Tensor]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(TraceError, match=r"layer 'layers.0' sets the state of .* generator"):
        traced(model_of(lambda: Chain(lambda: Inside(treat))))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("build", [BetweenSeeded, BetweenForked])
def test_glue_that_sets_the_generator_is_refused(build: type[Between]) -> None:
    functions = torch.manual_seed, torch.set_rng_state
    with pytest.raises(TraceError, match=rf"(?s)the model sets the state.*{build.treat.__name__}"):
        traced(model_of(lambda: build(lambda: nn.Linear(8, 8))))
    assert functions == (torch.manual_seed, torch.set_rng_state)


def test_a_loss_that_sets_the_generator_is_refused() -> None:
    model = model_of(
        lambda: Chain(lambda: nn.Linear(8, 8)),
        loss_fn=lambda output, batch: seeded(output).square().mean(),  # noqa: ARG005
    )
    with pytest.raises(TraceError, match="loss_fn sets the state"):
        traced(model)


def looked_at(x: Tensor) -> Tensor:
    assert torch.get_rng_state().numel()
    return nn.functional.dropout(x)


def test_a_layer_that_looks_at_the_generator_draws_as_plain_training_does() -> None:
    model = model_of(lambda: Chain(lambda: Inside(looked_at)))
    assert_same(model, plan_of(model, (0, 1, 3, 5), num_pipeline_ranks=3))
