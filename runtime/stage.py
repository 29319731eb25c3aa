"""Forward, recompute, backward and evaluation of one micro-batch through one stage.

The autograd graph is cut at the stage's inputs. An input enters through `Entry`, which hands its
gradient over instead of accumulating it in a leaf: so the graph keeps no tensor alive that backward
does not need. Where a later stage has already found a part of an input's gradient, that part enters
backward as the first summand, in the order in which autograd adds gradients when the whole model
runs at once: the sum is bitwise the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from planner.errors import UsageError
from planner.passages import enter
from planner.plan.types import StagePlan
from runtime.code import LossFunction, StageProgram
from runtime.compile import Compiled, Compiler
from runtime.module_buffers import ModuleBuffers
from runtime.random import KeyedRandom
from runtime.saved import SavedTensors

__all__ = ["Half", "Saved", "Stage", "modules_of"]

_backward = torch.autograd.Variable._execution_engine.run_backward
"""What torch.autograd.backward calls when it has compared shapes of outputs and gradients, which
takes longer than a small layer's backward; here the plan gives them one shape."""


class Half(Enum):
    """The halves of a backward that is split."""

    INPUTS = "inputs"
    """Gradients of the stage's inputs."""
    WEIGHTS = "weights"
    """Gradients of its parameters."""


@dataclass(slots=True)
class Saved:
    """What forward keeps for backward of one micro-batch."""

    edges: dict[str, GradientEdge]
    """Where gradients enter: outputs, and inputs that later stages read too."""
    sink: dict[str, Tensor]
    """Gradients of the inputs, after backward."""
    tensors: SavedTensors | None = None
    """What the graph saves, where the plan moves it to host memory."""


class Stage:
    """One stage of the plan on this rank's device."""

    def __init__(
        self,
        plan: StagePlan,
        gradient_tensors: frozenset[str],
        model: torch.nn.Module,
        loss_fn: LossFunction | None,
        device: torch.device,
        random: KeyedRandom,
        shared_modules: frozenset[int] = frozenset(),
        compiler: Compiler | None = None,
    ) -> None:
        """
        Args:
            plan: the stage.
            gradient_tensors: boundary tensors whose readers send a gradient back.
            model: the user's model; only the stage's own layers are touched.
            loss_fn: the user's loss, for the last stage.
            device: where it runs.
            random: keys of the random operators.
            shared_modules: id() of modules that several stages call.
            compiler: of what the stage calls; None where it runs eagerly.
        """
        self.plan = plan
        self._gradient_tensors = gradient_tensors
        self._random = random
        self._redraws: dict[Half | None, bool] = {}
        """Whether that backward draws random numbers; unknown before the first."""
        self._program = StageProgram(
            plan.code, plan.outputs, model, device, random, loss_fn, compiler
        )
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        modules = modules_of(plan, model)
        both = [m for key, m in modules.items() if key in shared_modules]
        self._buffers = ModuleBuffers(tuple(modules.values()), both)
        self.is_random = self._program.is_random

    @property
    def compiled(self) -> list[Compiled]:
        """What of it is given to torch.compile."""
        return self._program.compiled

    def try_out(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, training: bool
    ) -> None:
        """Run it once, for its compilation's sake; buffers of the modules keep their values."""
        with self._buffers.kept():
            if not training:
                self.evaluate(inputs, batch)
                return
            outputs, saved = self._forward(inputs, batch)
            self.backward(saved, {name: torch.zeros_like(x) for name, x in outputs.items()})

    def forward(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], micro_batch: int
    ) -> dict[str, Tensor]:
        """Outputs, with nothing kept for backward but what `recompute` needs.

        Gradients stay enabled, because modules and kernels choose by it how they compute; what
        the graph saves is let go at once.
        """
        with (
            self._buffers.noted(micro_batch),
            torch.autograd.graph.saved_tensors_hooks(_let_go, _let_go),
        ):
            return self._forward(inputs, batch)[0]

    def forward_saving(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Saved]:
        """Outputs (detached), and what backward needs."""
        if self._buffers.are_known:
            return self._forward(inputs, batch)
        with self._buffers.noted(None):
            return self._forward(inputs, batch)

    def evaluate(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs, for modules in evaluation mode: nothing is kept for backward."""
        values = {
            name: value.clone() if name in self.plan.mutated_inputs else value
            for name, value in inputs.items()
        }
        with torch.no_grad():
            outputs = self._run(values, batch, training=False)
            return {name: self._buffers.apart(value) for name, value in outputs.items()}

    def _forward(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Saved]:
        sink: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        edges: dict[str, GradientEdge] = {}
        for name, value in inputs.items():
            copy = name in self.plan.mutated_inputs
            if name in self._gradient_tensors:
                values[name] = enter(self._anchor, value, sink, name, copy)
                edges[name] = GradientEdge(values[name].grad_fn, 0)  # type: ignore[arg-type]
            else:
                values[name] = value.clone() if copy else value
        apart: dict[str, Tensor] = {}
        for name, value in self._run(values, batch).items():
            if value.requires_grad:
                edges[name] = _edge(value)
            apart[name] = self._buffers.apart(value.detach())
        if "loss" in apart:  # kernels may have shrunk it out of something large
            apart["loss"] = _without_gap(apart["loss"])
        return apart, Saved(edges, sink)

    def recompute(
        self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], micro_batch: int
    ) -> Saved:
        """What backward needs; buffers of the modules (running statistics) keep their values."""
        with self._buffers.restored(micro_batch):
            return self._forward(inputs, batch)[1]

    def backward(
        self,
        saved: Saved,
        gradients: Mapping[str, Tensor],
        parts: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        half: Half | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Gradients of the inputs; parameter gradients are added to each parameter's `.grad`.

        Args:
            saved: from forward_saving or recompute; used once, by INPUTS and WEIGHTS together.
            gradients: of outputs (`loss` included), and of inputs that later stages read too:
                what those found so far.
            parts: (parameter, what later stages found so far), where the order of additions
                counts: the first summand of the parameter's gradient.
            half: what to find; None for both at once.
            parameters: those that WEIGHTS finds gradients for.
        """
        edges = saved.edges
        roots = [(edges[name], g) for name, g in gradients.items() if name in edges]
        roots += [(get_gradient_edge(parameter), part) for parameter, part in parts]
        leaves: list[Tensor] | None = None
        if half is Half.INPUTS:
            leaves = [self._anchor] if self._gradient_tensors & set(self.plan.inputs) else []
        elif half is Half.WEIGHTS:
            leaves = list(parameters)
        if half is not Half.INPUTS:
            saved.edges = {}
        if roots and (leaves is None or leaves):
            with self._redrawing(half) if self.is_random else nullcontext():
                _backward(
                    tuple([edge for edge, _ in roots]),
                    tuple([g for _, g in roots]),
                    keep_graph=half is Half.INPUTS,
                    create_graph=False,
                    inputs=tuple(leaves or ()),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        found = {name: _without_gap(gradient) for name, gradient in saved.sink.items()}
        saved.sink.clear()
        return found

    @contextmanager
    def _redrawing(self, half: Half | None) -> Iterator[None]:
        """Layers that checkpoint themselves draw again, in backward, what their forward drew.

        Keys cost time at every operator. A backward does what the first one did, so one that drew
        nothing goes without.
        """
        if not self._redraws.get(half, True):
            yield
            return
        num_draws = self._random.num_draws
        with self._random:
            yield
        self._redraws[half] = self._random.num_draws > num_draws

    def module_buffers(self) -> list[Tensor]:
        """Buffers of the stage's modules."""
        return self._buffers.tensors()

    def _run(
        self, values: dict[str, Any], batch: Mapping[str, Tensor], *, training: bool = True
    ) -> dict[str, Tensor]:
        versions = [value._version for value in batch.values()]
        if self.is_random:
            with self._random:
                outputs = self._program(values, batch, training=training)
        else:
            outputs = self._program(values, batch, training=training)
        if versions == [value._version for value in batch.values()]:
            return outputs
        changed = [k for (k, x), v in zip(batch.items(), versions, strict=True) if x._version != v]
        raise UsageError(
            f"the model or its loss_fn changes batch key {changed[0]!r} in place",
            hint="write it without the in-place operation (y = y * 2, not y *= 2): a stage may run "
            "more than once on the same samples",
        )


def modules_of(plan: StagePlan, model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """id() -> module, of all modules inside the layers that a stage calls."""
    paths = [statement.path for statement in plan.code if statement.function == "layer"]
    return {id(m): m for path in paths for m in model.get_submodule(path).modules()}


def _edge(value: Tensor) -> GradientEdge:
    """As get_gradient_edge gives it, which asks more of a node that torch itself has made."""
    node = value.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(value)
    return GradientEdge(node, value.output_nr)


def _without_gap(tensor: Tensor) -> Tensor:
    """A copy of one that would keep more memory alive than it fills: a part of the gradient of a
    concatenation, say, which waits for an earlier stage."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _let_go(_: Any) -> Any:
    """A saved-tensor hook: forward without backward keeps nothing."""
