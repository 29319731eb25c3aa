"""Run recorded statements once on fake tensors, with autograd, and note what each of them does.

The facts come from execution, not from rules about operators: sizes, which values require a
gradient and really get one, what is changed in place, which random operators run. This module
does not know layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import LgaError, TraceError
from planner.graph import TensorSpec
from planner.model_file import raised_at
from planner.operators import is_random_operator
from planner.plan.code import Statement, references
from planner.trace.interpret import Context, execute
from planner.trace.refusals import check_loss, seeds_generator, statement_error
from planner.trace.watched_batch import WatchedBatch

__all__ = ["Analysis", "Facts", "analyse", "describe"]


_FIRST_SEED = 1 << 40
"""Of torch's generator in the trace: user code seeds it with none like this by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one statement does."""

    spec: TensorSpec | None
    """Of its value; None where that is not a tensor."""
    storages: frozenset[int]
    """Of the tensors in its value."""
    changed_storages: frozenset[int]
    """That it changes in place."""
    changes_buffers: bool
    """Whether the called module changes its own buffers (running statistics)."""
    num_random_operators: int
    operators: tuple[str, ...]
    """For calls of user code: the operators inside, wired by number, for the signature."""
    unread: tuple[str, ...]
    """For calls of layers: references to tensors whose values the call never looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Facts of every statement, and of the whole step."""

    facts: tuple[Facts, ...]
    trained: frozenset[int]
    """id() of the parameters that a gradient reaches."""
    loss_keys: tuple[str, ...]
    divides_backward: bool
    """Whether no autograd function written in Python is below the loss."""


class _Observer(TorchDispatchMode):
    """Counts random operators, and writes operators down where asked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_random_operators = 0
        self.lines: list[str] | None = None
        self.seen: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []
        self.storages: set[int] = set()

    def start(self, *, write: bool) -> None:
        self.num_random_operators = 0
        torch.default_generator.manual_seed(_FIRST_SEED)
        self.lines = [] if write else None
        self.seen.clear()
        self.alive.clear()
        self.storages.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_random_operator(func, args, kwargs):
            self.num_random_operators += 1
            # As in a run, where the seed is the next operator's ordinal.
            seed = torch.default_generator.initial_seed()
            torch.default_generator.manual_seed(seed + 1)
        result = func(*args, **kwargs)
        if self.lines is not None:
            words = (self._word(args), self._word(tuple(kwargs.items())), self._word(result))
            self.lines.append(f"{func} {words}")
        return result

    @property
    def only_draws(self) -> bool:
        """Whether the generator is where drawing alone has brought it since `start`."""
        seed = torch.default_generator.initial_seed()
        return seed == _FIRST_SEED + self.num_random_operators

    def _word(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            number = self.seen.get(id(value))
            if number is None:
                number = self.seen[id(value)] = len(self.seen)
                self.alive.append(value)  # keeps its id() from being used again
                self.storages.add(value.untyped_storage()._cdata)
                return f"#{number}:{describe(value)}"
            return f"#{number}"
        if isinstance(value, (tuple, list)):
            return "[" + ",".join(map(self._word, value)) + "]"
        return repr(value)


def describe(tensor: torch.Tensor) -> str:
    """What matters of a tensor for a signature."""
    sizes = f"{tuple(tensor.shape)}{tensor.stride()}"
    return f"{tensor.dtype}{sizes}{'g' if tensor.requires_grad else ''}"


@dataclass(slots=True, kw_only=True)
class _Draft:
    value: Any
    grad_fn: Any
    changed: frozenset[int]
    changes_buffers: bool
    num_random_operators: int
    operators: tuple[str, ...]
    unread: tuple[str, ...]


def analyse(statements: Sequence[Statement], context: Context) -> Analysis:
    """Run the statements under the current FakeTensorMode.

    Raises:
        ModelFileError: loss_fn raised.
        TraceError: the loss is not a scalar tensor, or no trainable parameter reaches it.
    """
    watched = WatchedBatch(context.batch)
    loss_context = Context(
        model=context.model, batch=watched, loss_fn=context.loss_fn, device=context.device
    )
    values: dict[str, Any] = {}
    drafts: list[_Draft] = []
    with _Observer() as observer:
        for statement in statements:
            used = loss_context if statement.function == "loss" else context
            try:
                drafts.append(_run(statement, values, used, observer))
            except LgaError:
                raise
            except (Exception, SystemExit) as error:
                raise statement_error(statement, error) from None
            values[statement.target] = drafts[-1].value
    check_loss(values["loss"], context.model)
    nodes, trained = _reached(values["loss"])
    divides_backward = not any(isinstance(node, BackwardCFunction) for node in nodes)
    if not divides_backward:
        trained |= _reached_inside(values["loss"], context.model)
    facts = tuple(
        _facts(statement, draft, nodes) for statement, draft in zip(statements, drafts, strict=True)
    )
    loss_keys = tuple(key for key in context.batch if key in watched.read)
    return Analysis(
        facts=facts, trained=trained, loss_keys=loss_keys, divides_backward=divides_backward
    )


def _run(
    statement: Statement, values: Mapping[str, Any], context: Context, observer: _Observer
) -> _Draft:
    names = list(dict.fromkeys(references(statement)))
    tensors = [
        leaf
        for name in names
        for leaf in pytree.tree_leaves(values[name])
        if isinstance(leaf, torch.Tensor)
    ]
    versions = [tensor._version for tensor in tensors]
    buffers: list[torch.Tensor] = []
    if statement.function == "layer":
        buffers = list(context.model.get_submodule(statement.path).buffers())
    buffer_versions = [buffer._version for buffer in buffers]
    observer.start(write=statement.function in ("layer", "loss"))
    value = execute(statement, values, context)
    if not observer.only_draws:
        raise seeds_generator(f"layer {statement.path!r}" if statement.path else "loss_fn")
    unread: list[str] = []
    if statement.function == "layer":
        touched = observer.storages | _storages(value)
        unread = [n for n in names if (own := _storages(values[n])) and not own & touched]
    return _Draft(
        value=value,
        grad_fn=value.grad_fn if isinstance(value, torch.Tensor) else None,
        changed=frozenset(
            tensor.untyped_storage()._cdata
            for tensor, version in zip(tensors, versions, strict=True)
            if tensor._version != version
        ),
        changes_buffers=any(
            buffer._version != version
            for buffer, version in zip(buffers, buffer_versions, strict=True)
        ),
        num_random_operators=observer.num_random_operators,
        operators=tuple(observer.lines or ()),
        unread=tuple(unread),
    )


def _storages(value: Any) -> frozenset[int]:
    leaves = pytree.tree_leaves(value)
    return frozenset(x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor))


def _reached(loss: torch.Tensor) -> tuple[set[Any], frozenset[int]]:
    """Autograd nodes below the loss, and the parameters at their ends."""
    nodes: set[Any] = set()
    trained: set[int] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            trained.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return nodes, frozenset(trained)


def _reached_inside(loss: torch.Tensor, model: nn.Module) -> frozenset[int]:
    """Parameters that backward finds a gradient for; autograd functions may use some by themselves.

    So does torch.utils.checkpoint where it re-enters autograd.
    """
    try:
        loss.backward()
        return frozenset(id(p) for p in model.parameters() if p.grad is not None)
    except Exception as error:
        raise TraceError(
            f"backward of the model failed: {type(error).__name__}: {error}{raised_at(error)}",
            hint="run loss_fn(build_model()(...), batch).backward() in plain PyTorch first",
        ) from None
    finally:
        model.zero_grad(set_to_none=True)


def _facts(statement: Statement, draft: _Draft, nodes: set[Any]) -> Facts:
    value, spec = draft.value, None
    if isinstance(value, torch.Tensor):
        spec = TensorSpec(
            name=statement.target,
            shape=tuple(value.shape),
            stride=value.stride(),
            dtype=str(value.dtype).removeprefix("torch."),
            requires_grad=draft.grad_fn is not None and draft.grad_fn in nodes,
        )
    return Facts(
        spec=spec,
        storages=_storages(value),
        changed_storages=draft.changed,
        changes_buffers=draft.changes_buffers,
        num_random_operators=draft.num_random_operators,
        operators=draft.operators,
        unread=draft.unread,
    )
