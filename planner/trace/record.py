"""Record one forward: torch operators between the leaves, one node for every call of a leaf.

`make_fx` before autograd gives the glue as the operators that eager code calls; leaves run as they
are, unrecorded, on fake tensors. This module knows torch.fx. It does not know statements or layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from planner.errors import LgaError, TraceError
from planner.model_file import raised_at
from planner.trace.checkpoints import Checkpoints, plain_checkpoints
from planner.trace.constants import kept_state, memory_of_constants_noted
from planner.trace.refusals import (
    NO_VALUES,
    PLAIN_VALUES,
    check_output,
    reads_values,
    refuse_in_glue,
    refuse_kept_state,
)

__all__ = ["Recording", "leaf_call", "record"]

_WAY_OUT = (
    "list the modules that run in sequence: `layers = [...]` in the model file, of nn.Modules or "
    "of module paths"
)
_PLAIN_FIRST = "run build_model()(**example_batch(2)) in plain PyTorch"


@fx.has_side_effect
def leaf_call(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stands in the graph for `model.get_submodule(path)(*args, **kwargs)`; never called."""
    raise AssertionError(path, args, kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One recorded forward."""

    graph: fx.Graph
    constants: fx.GraphModule
    """Holds what the graph's `get_attr` nodes read."""
    output: Any
    """What the model returned, with the graph's nodes in place of its tensors."""
    left_behind: tuple[str, ...]
    """Paths of modules inside leaves whose results the glue reads though no leaf returned them:
    a hook has kept them, or an attribute."""


def record(
    model: nn.Module,
    call: Callable[[dict[str, torch.Tensor]], Any],
    batch: Mapping[str, torch.Tensor],
    leaves: tuple[str, ...],
    *,
    with_lines: bool = False,
) -> Recording:
    """Record `call(batch)`, which runs `model`, under the current FakeTensorMode.

    `with_lines` keeps with every node the lines of code that it came from, which takes time.

    Raises:
        TraceError: the glue cannot be recorded: it reads a tensor's value, or hands a leaf an
            object that a plan cannot hold.
    """
    specs: list[pytree.TreeSpec] = []
    running: list[str] = []
    around: list[str] = []
    makers = WeakTensorKeyDictionary()

    def forward(*tensors: torch.Tensor) -> list[Any]:
        # Inside the traced function: fx replaces Module.__call__ too, around it.
        def in_layer() -> bool:
            return bool(running)

        with (
            plain_checkpoints(in_layer) as checkpoints,
            _leaves_recorded(model, leaves, running, around, makers, checkpoints),
            refuse_in_glue(in_layer),
            memory_of_constants_noted(),
        ):
            output = call(dict(zip(batch, tensors, strict=True)))
        flat, spec = pytree.tree_flatten(output)
        check_output(flat, model)
        refuse_kept_state(kept_state(model, leaves))
        specs.append(spec)
        return flat

    try:
        # Constants have values, which code may ask for; fake tensors refuse by themselves.
        traced = proxy_tensor.make_fx(
            forward,
            pre_dispatch=True,
            record_stack_traces=with_lines,
            _error_on_data_dependent_ops=False,
        )(*batch.values())
    except LgaError as error:
        where = f", in module {around[-1]!r}" if around and around[-1] else ""
        raise type(error)(f"{error.message}{where}{raised_at(error)}", hint=error.hint) from None
    except (Exception, SystemExit) as error:
        raise _trace_error(error, running, around) from None
    output_node = traced.graph.output_node()
    flat_output = list(output_node.args[0])  # type: ignore[arg-type]
    return Recording(
        graph=traced.graph,
        constants=traced,
        output=pytree.tree_unflatten(flat_output, specs[-1]),
        left_behind=tuple(_left_behind(traced, makers)),
    )


@contextmanager
def _leaves_recorded(
    model: nn.Module,
    leaves: tuple[str, ...],
    running: list[str],
    around: list[str],
    makers: WeakTensorKeyDictionary,
    checkpoints: Checkpoints,
) -> Iterator[None]:
    """Make every call of a leaf one node of the graph, the outermost leaf only.

    An error leaves in `running` the leaf, and in `around` the modules that it came through.
    `makers` gets the path of the outermost module inside a leaf that returned a tensor.
    """
    names = {id(module): name for name, module in model.named_modules()}
    paths: dict[int, str] = {}
    for path in leaves:
        paths.setdefault(id(model.get_submodule(path)), path)
    plain_call = nn.Module.__call__

    def recorded_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        mode = proxy_tensor.get_innermost_proxy_mode()
        if mode is None:
            inside = plain_call(module, *args, **kwargs)
            for tensor in filter(_is_tensor, pytree.tree_leaves(inside)):
                makers[tensor] = names.get(id(module), "")
            return inside
        if path is None:
            around.append(names.get(id(module), ""))
            result = plain_call(module, *args, **kwargs)
            around.pop()
            return result
        running.append(path)
        with checkpoints.refuse_statistics(path, module):
            result = _record_leaf(path, mode.tracer, module, plain_call, args, kwargs)
        running.pop()
        return result

    nn.Module.__call__ = recorded_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain_call  # type: ignore[method-assign]


def _record_leaf(
    path: str,
    tracer: Any,
    module: nn.Module,
    plain_call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    node_args, node_kwargs = pytree.tree_map(
        lambda value: _proxy_of(value, tracer, path), (args, kwargs)
    )
    proxy = tracer.create_proxy("call_function", leaf_call, (path, node_args, node_kwargs), {})
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if _is_tensor(value)]
    versions = [tensor._version for tensor in tensors]
    with proxy_tensor.disable_proxy_modes_tracing():
        result = plain_call(module, *args, **kwargs)
    _forget_after(proxy.node)
    proxy.node.meta["mutated"] = [
        tensor
        for tensor, version in zip(tensors, versions, strict=True)
        if tensor._version != version
    ]
    _track(result, proxy, tracer)
    return result


def _forget_after(node: fx.Node) -> None:
    """Forget what a leaf let through: where it switched gradients or autocast off and on.

    They need not be pairs: an autograd function begins with gradients off already.
    """
    inside = takewhile(lambda later: later is not node, reversed(node.graph.nodes))
    for later in list(inside):
        node.graph.erase_node(later)


def _left_behind(traced: fx.GraphModule, makers: WeakTensorKeyDictionary) -> Iterator[str]:
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target), None)
        if isinstance(value, torch.Tensor) and makers.get(value):
            yield makers[value]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _proxy_of(value: Any, tracer: Any, path: str) -> Any:
    if isinstance(value, torch.Tensor):
        slot = proxy_tensor.get_proxy_slot(value, tracer, value)
        return slot.proxy if hasattr(slot, "proxy") else slot
    if value is None or isinstance(
        value, (bool, int, float, str, slice, torch.dtype, torch.device, torch.layout,
                torch.memory_format)
    ):  # fmt: skip
        return value
    name = type(value).__name__
    hint = f"pass {PLAIN_VALUES}; or {_WAY_OUT}"
    if "Cache" in name:
        hint = "switch the cache off for training: model.config.use_cache = False in build_model"
    raise TraceError(
        f"module {path!r} is called with an object of type {name}, which a plan cannot hold",
        hint=hint,
    )


def _track(value: Any, proxy: Any, tracer: Any) -> None:
    """Give every tensor of a leaf's result its own node below the call's."""
    match value:
        case torch.Tensor():
            proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)
        case tuple() | list():
            for index, item in enumerate(value):
                if item is not None:
                    _track(item, proxy[index], tracer)
        case Mapping():
            for key, item in value.items():
                if item is not None:
                    _track(item, proxy[key], tracer)
        case None | bool() | int() | float() | str():
            pass
        case _:
            for name, item in getattr(value, "__dict__", {}).items():
                if isinstance(item, (torch.Tensor, tuple, list, dict)):
                    _track(item, getattr(proxy, name), tracer)


def _trace_error(error: BaseException, running: list[str], around: list[str]) -> TraceError:
    where = "between its layers"
    if running:
        where = f"in module {running[-1]!r}"
    elif around and around[-1]:
        where = f"between the layers of module {around[-1]!r}"
    text = str(error).strip().splitlines()
    reason = text[0] if text else ""
    hint = f"{_PLAIN_FIRST}; if it runs, {_WAY_OUT}"
    if reads_values(error):
        hint = NO_VALUES
    elif "dynamo-optimized" in reason:
        hint = "leave torch.compile out of build_model: compiled code cannot be cut into layers"
    return TraceError(
        f"the model cannot be traced: {where}, {type(error).__name__}: {reason}{raised_at(error)}",
        hint=hint,
    )
