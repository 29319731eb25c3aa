"""Run a LayerGraph from its printed text alone, and the eager model beside it."""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner.graph import LayerGraph
from planner.model_file import forward_keys, model_from_functions
from planner.operators import is_random_operator
from planner.plan.code import parse_statement
from planner.trace import trace

Batch = dict[str, torch.Tensor]


class KeyedRandom(TorchDispatchMode):
    """Seeds the generator before every random operator with the operator's ordinal."""

    def __init__(self) -> None:
        super().__init__()
        self.ordinal = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_random_operator(func, args, kwargs or {}):
            torch.manual_seed(self.ordinal)
            self.ordinal += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Result:
    """Loss and gradients of one run, and how many random operators it ran."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    num_random_operators: int


def eager(model: nn.Module, batch: Batch, keys: list[str], loss_fn: Any) -> Result:
    """The user's own forward and backward on a copy of the model."""
    model = copy.deepcopy(model).train()
    with KeyedRandom() as random:
        output = model(**{key: batch[key] for key in keys}) if keys else model(*batch.values())
        loss = output if loss_fn is None else loss_fn(output, batch)
        if not isinstance(loss, torch.Tensor):
            loss = loss["loss"]
    loss.backward()
    return _result(model, loss, random.ordinal)


def staged(model: nn.Module, batch: Batch, graph: LayerGraph, loss_fn: Any) -> Result:
    """Every layer as a stage of its own: detached inputs, backward from the last to the first."""
    model = copy.deepcopy(model).train()
    specs = graph.tensor_specs
    boundary: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    runs = []
    num_random = 0
    for index in range(len(graph.layers)):
        stage = graph.stage_code(index, index)
        allowed = {key: batch[key] for key in stage.batch_keys}
        inputs = {
            name: boundary[name].detach().clone().requires_grad_(specs[name].requires_grad)
            for name in stage.inputs
        }
        values: dict[str, Any] = {
            name: value.clone() if name in stage.mutated_inputs else value
            for name, value in inputs.items()
        }
        num_random += run_text(stage.code, values, model, allowed, loss_fn)
        outputs = {name: values[name] for name in stage.outputs}
        for name in stage.outputs:
            if name != "loss":
                spec, made = specs[name], values[name]
                assert tuple(made.shape) == spec.shape
                assert made.stride() == spec.stride
                assert str(made.dtype) == f"torch.{spec.dtype}"
                assert made.requires_grad or not spec.requires_grad
        boundary.update(outputs)
        runs.append((inputs, outputs))
    for inputs, outputs in reversed(runs):
        roots = [n for n in outputs if n == "loss" or (specs[n].requires_grad and n in gradients)]
        torch.autograd.backward(
            [outputs[name] for name in roots],
            [torch.ones(()).expand_as(outputs[n]) if n == "loss" else gradients[n] for n in roots],
        )
        for name, tensor in inputs.items():
            if tensor.grad is not None:
                known = gradients.get(name)
                gradients[name] = tensor.grad if known is None else known + tensor.grad
    assert num_random <= graph.num_random_operators
    return _result(model, boundary["loss"], graph.num_random_operators)


def run_text(
    code: Any, values: dict[str, Any], model: nn.Module, batch: Batch, loss_fn: Any
) -> int:
    """Evaluate the printed lines as Python, in the order given."""
    functions: dict[str, Any] = {
        "layer": model.get_submodule,
        "batch": batch.__getitem__,
        "parameter": model.get_parameter,
        "buffer": model.get_buffer,
        "tensor": lambda items, dtype: torch.tensor(items, dtype=dtype),
        "getitem": operator.getitem,
        "getattr": getattr,
        "unflatten": lambda s, leaves: pytree.tree_unflatten(leaves, pytree.treespec_loads(s)),
        "loss": lambda output: loss_fn(output, batch),
        "aten": torch.ops.aten,
        "torch": torch,
        "device": torch.device("cpu"),
    }
    total = 0
    for statement in code:
        line = str(statement)
        assert parse_statement(line) == statement
        expression = line.partition(" = ")[2].partition("  # random ")[0]
        with KeyedRandom() as random:
            random.ordinal = statement.first_random_operator
            # The project's own text, printed by the tracer that is under test.
            values[statement.target] = eval(expression, {**functions, **values})
        assert random.ordinal == statement.first_random_operator + statement.num_random_operators
        total += statement.num_random_operators
    return total


def _result(model: nn.Module, loss: torch.Tensor, num_random_operators: int) -> Result:
    return Result(
        loss=loss.detach(),
        gradients={name: p.grad for name, p in model.named_parameters()},
        buffers=dict(model.named_buffers()),
        num_random_operators=num_random_operators,
    )


def assert_equal(one: Result, other: Result, *, rounding: bool = False) -> None:
    """Bitwise equal loss, gradients (missing where missing) and buffers.

    Args:
        rounding: allow gradients to differ by the order of additions, as they must where a tensor
            is used several times in each of several later layers.
    """
    assert torch.equal(one.loss, other.loss), (one.loss, other.loss)
    assert one.num_random_operators == other.num_random_operators
    for name, gradient in one.gradients.items():
        found = other.gradients[name]
        assert (gradient is None) == (found is None), name
        if gradient is not None and found is not None:
            if rounding:
                torch.testing.assert_close(gradient, found, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(gradient, found), (name, (gradient - found).abs().max())
    for name, buffer in one.buffers.items():
        assert torch.equal(buffer, other.buffers[name]), name


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_exact(
    build: Callable[[], nn.Module],
    example_batch: Callable[[int], Batch],
    loss_fn: Any = None,
    *,
    sizes: tuple[int, ...] = (2, 3),
    layers: tuple[str, ...] = (),
    rounding: bool = False,
) -> LayerGraph:
    """Trace; run eager and staged on a real model; everything must be bitwise equal."""
    traced = trace(model_from_functions(build, example_batch, loss_fn=loss_fn, layers=layers))
    with seeded():
        model = build().train()
    graph = traced.layer_graph(sizes[0])
    for size in sizes:
        with seeded(size):
            batch = example_batch(size)
        graph = traced.layer_graph(size)
        plain = eager(model, batch, list(forward_keys(model, batch)), loss_fn)
        assert_equal(plain, staged(model, batch, graph, loss_fn), rounding=rounding)
        trainable = {spec.name for spec in graph.parameters if spec.trainable}
        assert trainable == {n for n, g in plain.gradients.items() if g is not None}
        assert_well_formed(graph)
    return graph


def assert_well_formed(graph: LayerGraph) -> None:
    """Makers precede readers, names are unique, the last statement makes the loss."""
    targets = [s.target for s in graph.prologue]
    targets += [s.target for layer in graph.layers for s in layer.code]
    assert len(targets) == len(set(targets))
    assert all(target.isidentifier() for target in targets)
    makers = graph.makers
    for index, layer in enumerate(graph.layers):
        assert all(makers[name] < index for name in layer.inputs)
        assert layer.code
    assert graph.layers[-1].code[-1].target == "loss"
    assert graph.layers[-1].outputs == ("loss",)
    assert len({layer.name for layer in graph.layers}) == len(graph.layers)
    assert {t.name for t in graph.tensors} == set(makers) - {"loss"}
