"""What a plan could only get wrong silently is refused by the tracer, or traced right."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planned import assert_same, plan_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from planner.errors import TraceError
from planner.measure import measure
from planner.model_file import ModelFile, model_from_functions
from planner.trace import trace


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.second(self.between(self.first(input)))


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x)


class Checkpointed(nn.Module):
    """A layer that saves memory by itself."""

    def __init__(self, use_reentrant: bool = False, preserve_rng_state: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}

    def inner(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, nn.functional.dropout(x), **self.how)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x + self.weight


class FrozenByNoGrad(nn.Module):
    """Its first layer hands on two tensors and is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Pair(), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.no_grad():
            one, other = self.first(input)
        return self.second(one + other)


def model_file(build: Callable[[], nn.Module]) -> ModelFile:
    return model_from_functions(
        build,
        lambda batch_size: {"input": torch.randn(batch_size, 4)},
        loss_fn=lambda output, _: output.square().mean(),
        name="odd",
    )


def hooked(value: Tensor) -> Tensor:
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient * 2)
    return value


def test_an_autograd_function_between_layers_is_refused() -> None:
    with pytest.raises(TraceError, match="Straight"):
        trace(model_file(lambda: Two(Straight.apply)))


def test_a_gradient_hook_between_layers_is_refused() -> None:
    with pytest.raises(TraceError, match="register_hook"):
        trace(model_file(lambda: Two(hooked)))


def test_an_autograd_function_inside_a_layer_is_the_users_own() -> None:
    whole = model_file(lambda: nn.Sequential(nn.Linear(4, 4), Rounding(), nn.Linear(4, 4)))
    assert_same(whole, plan_of(whole, (0, 1, 2), num_pipeline_ranks=2))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_draws_again_what_forward_drew(use_reentrant: bool) -> None:
    layer = functools.partial(Checkpointed, use_reentrant=use_reentrant)
    model = model_file(lambda: nn.Sequential(nn.Linear(4, 4), layer(), layer(), nn.Linear(4, 4)))
    for recompute in (False, True):
        plan = plan_of(model, (0, 1, 4), num_pipeline_ranks=2, recompute=recompute)
        assert_same(model, plan)


def test_numbers_that_only_backward_draws_are_refused() -> None:
    layer = functools.partial(Checkpointed, preserve_rng_state=False)
    with pytest.raises(TraceError, match="draws random numbers in backward"):
        measure(trace(model_file(lambda: nn.Sequential(nn.Linear(4, 4), layer()))), 2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_between_layers_is_left_to_the_plan(use_reentrant: bool) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
            self.dropout = nn.Dropout(0.5)

        def two(self, x: Tensor, first: int) -> Tensor:
            return self.layers[first + 1](self.dropout(self.layers[first](x)))

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            for first in (0, 2):  # with re-entry these train nothing: the batch has no gradient
                input = checkpoint(self.two, input, first, use_reentrant=use_reentrant)  # noqa: A001
            return self.layers[3](input)

    model = model_file(Between)
    plan = plan_of(model, (0, 2, 5), num_pipeline_ranks=2)
    trained = [p.trainable for p in plan.parameters]
    assert trained == [not use_reentrant] * 6 + [True] * 2
    assert_same(model, plan)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_that_cannot_be_divided_is_known(use_reentrant: bool) -> None:
    layer = functools.partial(Checkpointed, use_reentrant=use_reentrant)
    traced = trace(model_file(lambda: nn.Sequential(nn.Linear(4, 4), layer())))
    assert traced.layer_graph(2).divides_backward is not use_reentrant


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_statistics_that_a_checkpoint_would_move_twice_are_refused(use_reentrant: bool) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return checkpoint(self.norm, self.first(input), use_reentrant=use_reentrant)

    with pytest.raises(TraceError, match="layer 'norm' changes its buffers"):
        trace(model_file(Normalised))


def test_several_results_of_a_layer_under_no_grad_are_detached() -> None:
    frozen = model_file(FrozenByNoGrad)
    assert_same(frozen, plan_of(frozen, (0, 1, 2), num_pipeline_ranks=2))


def test_statistics_of_a_layer_read_between_layers_are_refused() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return self.head(self.norm(input)) / self.norm.running_var

    with pytest.raises(TraceError, match=r"norm\.running_var.*layer 'norm'"):
        trace(model_file(Normalised))
