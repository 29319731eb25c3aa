"""What is made of numbers alone keeps its values in the trace, so code may ask for them."""

from typing import Any

import pytest
import torch
from planned import Chain, assert_same, model_of, plan_of, traced
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner.errors import TraceError
from planner.trace.fake import fake_run


def is_real(value: Tensor) -> bool:
    return not isinstance(value, FakeTensor)


@pytest.fixture
def fake() -> Any:
    """A fake tensor of two rows, inside a trace."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_run(mode):
        yield mode.from_tensor(torch.empty(2, 3))


def test_numbers_are_real_and_what_depends_on_a_fake_tensor_is_not(fake: Tensor) -> None:
    positions = torch.arange(6).view(2, 3)
    assert is_real(positions)
    assert bool((positions.diff(dim=1) == 1).all())
    assert is_real(torch.tensor([1.0, 2.0]) + 1)
    assert not is_real(fake + positions)
    assert not is_real(torch.zeros_like(fake))
    assert not is_real(fake.new_zeros(3))


def test_random_undefined_and_large_tensors_are_fake(fake: Tensor) -> None:  # noqa: ARG001
    assert not is_real(torch.rand(3))
    assert not is_real(torch.randperm(3))
    assert not is_real(torch.zeros(3).bernoulli())
    assert not is_real(torch.empty(3))
    assert not is_real(torch.arange(1 << 30))
    assert not is_real(torch.zeros(1).expand(1 << 40))
    assert not is_real(torch.zeros(3, device="meta") + 1)


def test_a_constant_that_is_given_a_fake_value_is_no_constant_any_more(fake: Tensor) -> None:
    table = torch.zeros(2, 3)
    row = table[0]
    assert float(table.sum()) == 0
    assert table.copy_(fake) is table
    assert table.shape == (2, 3)
    for view in (table, row, table[1], row + 1):
        with pytest.raises(RuntimeError):
            float(view.sum())
    other = torch.zeros(3)
    other[1] = fake[0, 0]
    with pytest.raises(RuntimeError):
        float(other[1])
    third = torch.zeros(3)
    third.add_(1)
    assert third.tolist() == [1, 1, 1]


def test_a_random_change_in_place_makes_a_constant_unknown(fake: Tensor) -> None:  # noqa: ARG001
    noise = torch.zeros(3)
    noise.normal_()
    with pytest.raises(RuntimeError):
        float(noise.sum())


class Branches(Chain):
    """Glue that asks for values of constants, and fills one with the batch."""

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        if (positions.diff() == 1).all() and positions[-1].item() == 7:
            x = x * (positions + 1)
        padded = torch.zeros(x.shape[0], 8)
        padded[:, 2:] = x[:, :-2]
        return super().forward(padded)


def test_glue_may_ask_for_the_values_of_constants() -> None:
    model = model_of(lambda: Branches(lambda: nn.Linear(8, 8)))
    assert_same(model, plan_of(model, (0, 1, 2, 3, 5), num_pipeline_ranks=2))


class Wrong(Chain):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(8)
        table[0] = x[0, 0]
        if table.sum() == 0:  # of the batch, by now
            x = x + 1
        return super().forward(x)


def test_values_of_the_batch_are_refused_also_on_their_way_through_a_constant() -> None:
    with pytest.raises(TraceError, match=r"if table.sum\(\) == 0") as caught:
        traced(model_of(lambda: Wrong(lambda: nn.Linear(8, 8))))
    assert "torch.where" in caught.value.hint


class Counting(Chain):
    """Glue that keeps what it changes from forward to forward."""

    def __init__(self, of_batch: bool) -> None:
        super().__init__(lambda: nn.Linear(8, 8))
        self.of_batch = of_batch
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = torch.ones(())
            if self.of_batch:
                self.state.copy_(x.abs().max())
        if not self.of_batch:
            self.state += 1
        return super().forward(x / self.state)


@pytest.mark.parametrize("of_batch", [False, True])
def test_a_constant_that_forwards_change_and_keep_is_refused(of_batch: bool) -> None:
    with pytest.raises(TraceError, match="keeps 'state'"):
        traced(model_of(lambda: Counting(of_batch)))


class Tabled(Chain):
    """Glue that keeps a table of numbers."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(8) + 1
        return super().forward(x * self.table)


def test_a_table_that_a_forward_keeps_is_a_constant() -> None:
    model = model_of(lambda: Tabled(lambda: nn.Linear(8, 8)))
    assert_same(model, plan_of(model, (0, 2, 5), micro_batch_size=1))


GLOBAL = torch.ones(8)


class Growing(Chain):
    def forward(self, x: Tensor) -> Tensor:
        GLOBAL.add_(1)
        return super().forward(x * GLOBAL)


def test_a_constant_from_outside_that_the_glue_changes_is_refused() -> None:
    with pytest.raises(TraceError, match=r"(?s)kept from step to step.*GLOBAL.add_"):
        traced(model_of(lambda: Growing(lambda: nn.Linear(8, 8))))


class Scale(nn.Linear):
    """A layer that leaves a number in an attribute."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.largest = torch.zeros(())
        self.largest.copy_(x.detach().abs().max())
        return super().forward(x)


class Scaled(Chain):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output / self.layers[0].largest


def test_a_constant_that_a_layer_filled_is_not_what_it_was_made_as() -> None:
    with pytest.raises(TraceError, match="values cannot be known"):
        traced(model_of(lambda: Scaled(Scale)))
