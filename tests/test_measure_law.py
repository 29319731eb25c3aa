"""Counts as lines in the micro-batch size, and what optimizers keep, against direct counts."""

import dataclasses
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from models import own
from zoo import PATHS

from planner.graph import ParameterSpec
from planner.measure import measure
from planner.measure.law import fit_law
from planner.measure.optimizer_state import measure_optimizer
from planner.model_file import load_model_file, model_from_functions
from planner.precision import Precision, parameter_state
from planner.trace import trace


@pytest.mark.parametrize(
    "name", [pytest.param("resnet", marks=pytest.mark.slow), "transformer_encoder"]
)
def test_lines_give_what_is_counted(name: str) -> None:
    traced = trace(load_model_file(str(PATHS[name])))
    law = fit_law(traced)
    assert law.broken == ()
    assert law.profile(7) == measure(traced, 7)


def test_a_layer_off_its_line_is_named_and_counted() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x) @ torch.ones(8, 8) if len(x) > 4 else self.first(x))

    traced = trace(model_from_functions(Odd, own.vectors, loss_fn=own.square))
    law = fit_law(traced)
    assert law.broken
    assert law.profile(7) == measure(traced, 7)


class Cycle(torch.nn.Module):
    """Leaves tensors in reference cycles, which Python's collector frees whenever it comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = self.linear(x)
            cycle: list[Any] = [x * 2]
            cycle.append(cycle)
        return x


@contextmanager
def collector(threshold: int) -> Iterator[None]:
    """It comes by after so many new objects, or not at all (0)."""
    before = gc.get_threshold()
    gc.set_threshold(threshold, 1000, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def test_counts_do_not_depend_on_the_garbage_collector() -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(Cycle(), Cycle(), torch.nn.Linear(8, 4))

    def example_batch(batch_size: int) -> own.Batch:
        return {"input": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}

    traced = trace(model_from_functions(build, example_batch, loss_fn=own.square))
    with collector(0):
        expected = measure(traced, 2, in_short=False)
    with collector(1):
        assert measure(traced, 2, in_short=False) == expected
    assert gc.isenabled()


def test_counting_again_gives_the_same() -> None:
    """torch's fake kernels answer from memory the second time; a tensor that an LSTM's backward
    returns twice is then two.
    """
    traced = trace(load_model_file(str(PATHS["recurrent"])))
    first = measure(traced, 2, in_short=False)
    assert measure(traced, 2, in_short=False) == first


OPTIMIZERS: list[tuple[Any, bool]] = [
    (partial(torch.optim.Adam, amsgrad=True), True),
    (partial(torch.optim.SGD, lr=0.1, momentum=0.9), True),
    *(
        (build, build is not torch.optim.Adafactor)
        for build in vars(torch.optim).values()
        if inspect.isclass(build)
        and build not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    ),
]
"""All of torch that step on dense gradients without a closure."""


@pytest.mark.parametrize(("build", "is_elementwise"), OPTIMIZERS)
def test_optimizer_bytes_are_those_of_a_real_step(build: Any, is_elementwise: bool) -> None:
    one = (1, 1) if build is torch.optim.Muon else (1,)  # which takes matrices alone
    specs = [
        ParameterSpec(name="weight", shape=(6, 5), dtype="float32", trainable=True),
        ParameterSpec(name="one", shape=one, dtype="float32", trainable=True),
        ParameterSpec(name="frozen", shape=(6, 5), dtype="float32", trainable=False),
    ]
    plain = model_from_functions(own.Mlp, own.vectors, loss_fn=own.square)
    model_file = dataclasses.replace(plain, build_optimizer=lambda parameters: build(parameters))
    found = measure_optimizer(model_file, specs)
    for spec in specs[:2]:
        parameter = torch.nn.Parameter(torch.randn(spec.shape))
        parameter.grad = torch.randn(spec.shape)
        optimizer = build([parameter])
        optimizer.step()
        kept = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        assert found.num_bytes[spec.name] == sum(tensor.nbytes for tensor in kept)
    assert "frozen" not in found.num_bytes
    assert found.is_elementwise == is_elementwise


def test_mixed_precision_keeps_masters() -> None:
    spec = ParameterSpec(name="w", shape=(10,), dtype="bfloat16", trainable=True)
    state = parameter_state(spec, Precision.BFLOAT16, 80)
    assert (state.compute_bytes, state.master_bytes, state.gradient_bytes) == (20, 40, 40)
    assert state.num_bytes == 180
    whole = parameter_state(dataclasses.replace(spec, dtype="float32"), Precision.MODEL, 80)
    assert (whole.compute_bytes, whole.master_bytes, whole.gradient_bytes) == (40, 0, 40)
    frozen = parameter_state(dataclasses.replace(spec, trainable=False), Precision.BFLOAT16, 80)
    assert frozen.num_bytes == 20
