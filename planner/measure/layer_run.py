"""One layer on real tensors: forward, backward, recompute, and what each holds at its peak.

A layer runs as a stage of its own would run, its glue and prologue included, and its gradients add
to sums that are there before. It knows one layer. It does not know clocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planner.graph import StageCode
from planner.passages import Entry, Exit
from planner.plan.code import references
from planner.plan.meaning import fill, function_of, template_of
from planner.storages import LiveStorages, StorageWatcher, tensors_in
from planner.trace import Context

__all__ = ["Forward", "LayerRun", "peak_bytes"]


@dataclass(slots=True)
class Forward:
    """What a forward leaves for its backward."""

    outputs: dict[str, Any]
    sink: dict[str, Tensor]
    """Gradients of the inputs, once backward has found them."""


@dataclass(frozen=True, slots=True)
class _Call:
    target: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    dead: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class LayerRun:
    """One layer, ready to run many times."""

    stage: StageCode
    context: Context
    inputs: dict[str, Tensor]
    """Values of boundary tensors, those that pass a gradient back with `requires_grad`."""
    roots: tuple[str, ...]
    """Outputs that a gradient comes back for."""
    parameters: list[nn.Parameter]
    """Those that are trained."""
    _calls: list[_Call] = field(init=False)
    _changing: list[Tensor] = field(init=False, default_factory=list)
    """Buffers that forward changes."""
    _anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._calls = _resolved(self.stage, self.context)
        self._anchor = torch.zeros((), device=self.context.device, requires_grad=True)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        buffers = list(self.context.model.buffers())
        versions = [buffer._version for buffer in buffers]
        self.forward()
        self._changing = [b for b, old in zip(buffers, versions, strict=True) if b._version != old]

    def forward(self) -> Forward:
        """Outputs, and a graph that keeps what backward reads."""
        return self.forward_of(*self.enter())

    def enter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inputs as a graph takes them, those that are changed in place copied, and where
        their gradients will go."""
        sink: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, value in self.inputs.items():
            copy = name in self.stage.mutated_inputs
            if value.requires_grad:
                values[name] = Entry.apply(self._anchor, value.detach(), sink, name, copy)  # type: ignore[no-untyped-call]
            else:
                values[name] = value.clone() if copy else value
        return values, sink

    def forward_of(self, values: dict[str, Any], sink: dict[str, Tensor]) -> Forward:
        """`forward` of inputs that have entered."""
        for call in self._calls:
            values[call.target] = call.function(
                *[fill(argument, values) for argument in call.arguments],
                **{key: fill(value, values) for key, value in call.keywords.items()},
            )
            for name in call.dead:
                del values[name]
        outputs = {name: values[name] for name in self.stage.outputs}
        return Forward(outputs, sink)

    def recompute(self) -> Forward:
        """Forward again, leaving the buffers that it changes as they were."""
        before = [buffer.clone() for buffer in self._changing]
        forward = self.forward()
        for buffer, value in zip(self._changing, before, strict=True):
            buffer.copy_(value)
        return forward

    @property
    def has_backward(self) -> bool:
        learns = self.parameters or any(value.requires_grad for value in self.inputs.values())
        return bool(self.roots and learns)

    def gradients(self, forward: Forward) -> dict[str, Tensor]:
        """What later layers would send back."""
        return {name: torch.ones_like(forward.outputs[name]) for name in self.roots}

    def root(self, forward: Forward, gradients: dict[str, Tensor]) -> Tensor:
        """Where backward begins; it lets go of `gradients`, as the runtime does."""
        outputs = [forward.outputs[name] for name in self.roots]
        root: Tensor = Exit.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
        return root


def _resolved(stage: StageCode, context: Context) -> list[_Call]:
    """The code with every name looked up: what is timed is the layer, not the look-up."""
    calls: list[_Call] = []
    later = set(stage.outputs)
    for statement in reversed(stage.code):
        used = {statement.target, *references(statement)}
        device = context.device
        calls.append(
            _Call(
                target=statement.target,
                function=function_of(statement, context),
                arguments=tuple(template_of(value, device) for value in statement.arguments),
                keywords={key: template_of(value, device) for key, value in statement.keywords},
                dead=tuple(used - later),
            )
        )
        later |= used
    return calls[::-1]


def peak_bytes(run: LayerRun) -> tuple[int, int]:
    """Peaks of forward above the inputs, and of backward above what forward kept.

    CUDA: what torch's allocator handed out, in its own rounding. CPU: storages, followed from the
    operator that makes them. Both leave sums of parameter gradients out.
    """
    if run.context.device.type == "cuda":
        return _allocated_peaks(run)
    model = run.context.model
    sums = [p.grad for p in run.parameters if p.grad is not None]
    storages = LiveStorages(
        [
            *model.parameters(), *model.buffers(), *sums, *run.inputs.values(),
            *run.context.batch.values(),
        ]
    )  # fmt: skip
    values, sink = run.enter()
    storages.ignore(tensors_in(values))
    with StorageWatcher(storages):
        forward = run.forward_of(values, sink)
    forward_peak = storages.peak_bytes
    if not run.has_backward:
        return forward_peak, 0
    gradients = run.gradients(forward)
    root = run.root(forward, gradients)
    begin = torch.ones_like(root)
    storages.ignore([begin, *gradients.values()])
    before = storages.restart()
    with StorageWatcher(storages):
        root.backward(begin)
    return forward_peak, storages.peak_bytes - before


def _allocated_peaks(run: LayerRun) -> tuple[int, int]:
    device = run.context.device
    values, sink = run.enter()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward = run.forward_of(values, sink)
    forward_peak = torch.cuda.max_memory_allocated(device) - before
    if not run.has_backward:
        return forward_peak, 0
    root = run.root(forward, run.gradients(forward))
    begin = torch.ones_like(root)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    root.backward(begin)
    return forward_peak, torch.cuda.max_memory_allocated(device) - before
