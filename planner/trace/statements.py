"""Statements out of a recorded forward.

Every node becomes one statement whose text says everything. Two things that a graph leaves
implicit become explicit: an in-place change becomes an edge (later readers of an alias read
`getitem((alias, change), 0)`), and a `no_grad` region becomes `aten.detach`. This module knows the
statement language and torch.fx. It does not know layers.
"""

import contextlib
import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from planner.errors import TraceError
from planner.model_file import recorded_at
from planner.plan.code import FUNCTIONS, Reference, Statement, Symbol, is_plain_specification
from planner.trace.aliases import Aliases
from planner.trace.constants import is_known_constant
from planner.trace.record import Recording, leaf_call
from planner.trace.refusals import PLAIN_VALUES, refuse_changing_buffer

__all__ = ["identifier", "write_statements"]

_MAX_CONSTANT_ELEMENTS = 4096
_RESERVED = {*FUNCTIONS, "aten", "device", "float", "torch"}


def identifier(text: str) -> str:
    """A Python name, readable and permitted as a statement's target."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    if name[0].isdigit():
        return f"layer_{name}"
    return f"value_{name}" if keyword.iskeyword(name) or name in _RESERVED else name


def write_statements(
    recording: Recording, model: nn.Module, batch: Mapping[str, torch.Tensor], *, has_loss_fn: bool
) -> list[Statement]:
    """Statements of the whole forward in execution order; the last one makes `loss`.

    Raises:
        TraceError: a value has no text form, or the glue changes in place what it does not own.
    """
    writer = _Writer(recording, model, batch)
    for node in recording.graph.nodes:
        try:
            writer.write_node(node)
        except TraceError as error:
            where = recorded_at(node.stack_trace or "")
            raise TraceError(error.message + where, hint=error.hint) from None
    if has_loss_fn:
        writer.add("loss", "loss", [writer.convert(recording.output, "the model's output")])
    else:
        writer.select_loss(recording.output)
    return writer.statements


class _Writer:
    def __init__(
        self, recording: Recording, model: nn.Module, batch: Mapping[str, torch.Tensor]
    ) -> None:
        self.statements: list[Statement] = []
        self.constants = recording.constants
        self.keys = iter(batch)
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.called = {str(n.args[0]) for n in recording.graph.nodes if n.target is leaf_call}
        self.names: dict[fx.Node, str] = {}
        self.constant_names: dict[int, str] = {}
        """id() of a parameter, buffer or constant -> the statement that reads it."""
        # What a stage keeps names tensors and keys of the batch: no name may be both.
        self.used: set[str] = {"loss", *batch}
        self.aliases = Aliases()
        self.grad_enabled = True

    def fresh(self, text: str) -> str:
        base = name = identifier(text)
        number = 0
        while name in self.used:
            number += 1
            name = f"{base}_{number}"
        self.used.add(name)
        return name

    def add(
        self,
        target: str,
        function: str,
        arguments: list[Any],
        keywords: Mapping[str, Any] | None = None,
        path: str = "",
    ) -> str:
        self.statements.append(
            Statement(
                target=target,
                function=function,
                path=path,
                arguments=tuple(arguments),
                keywords=tuple((keywords or {}).items()),
            )
        )
        return target

    def write_node(self, node: fx.Node) -> None:
        if node.op == "output" or node.target is torch._C._set_grad_enabled:
            if node.op != "output":
                self.grad_enabled = bool(node.args[0])
            return
        if node.op == "placeholder":
            key = next(self.keys)
            self.names[node] = self.add(self.fresh(f"batch_{key}"), "batch", [key])
            self.aliases.remember(node, f"the batch's {key!r}")
        elif node.op == "get_attr":
            self.write_constant(node)
        elif node.target is leaf_call:
            self.write_leaf(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self.write_operator(node)
        elif node.target in (operator.getitem, getattr):
            function = "getitem" if node.target is operator.getitem else "getattr"
            self.names[node] = self.add(
                self.fresh(self.result_name(node)), function, self.convert_all(node.args, function)
            )
            self.aliases.remember(node)
            self.detach_in_no_grad(node)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            raise TraceError(
                f"the model calls {name} between its layers, which a plan cannot hold",
                hint="enter torch.autocast inside the layers, or build the model in that type"
                if "autocast" in name
                else "move the call into one of the model's layers",
            )

    def result_name(self, node: fx.Node) -> str:
        source, index = node.args
        assert isinstance(source, fx.Node)
        return f"{self.names[source]}_{index}"

    def write_constant(self, node: fx.Node) -> None:
        value = self.constants
        for word in str(node.target).split("."):
            value = getattr(value, word)
        assert isinstance(value, torch.Tensor)
        if (known := self.constant_names.get(id(value))) is not None:
            self.names[node] = known
            return
        if (name := self.parameters.get(id(value))) is not None:
            self.names[node] = self.add(self.fresh(name), "parameter", [name])
            self.aliases.remember(node, f"parameter {name!r}")
        elif (name := self.buffers.get(id(value))) is not None:
            refuse_changing_buffer(name, value, self.called)
            self.names[node] = self.add(self.fresh(name), "buffer", [name])
            self.aliases.remember(node, f"buffer {name!r}")
        else:
            constant = getattr(value, "constant", value)
            if constant is None or constant.numel() > _MAX_CONSTANT_ELEMENTS:
                raise TraceError(
                    f"the model uses a tensor of shape {tuple(value.shape)} between its layers "
                    "that is neither a parameter nor a buffer",
                    hint="return it from the layer that makes it; what belongs to the model is a "
                    "buffer: self.register_buffer(name, tensor)",
                )
            arguments = [_values(constant), Symbol(str(constant.dtype))]
            self.names[node] = self.add(self.fresh("constant"), "tensor", arguments)
            self.aliases.remember(node, "a tensor that is kept from step to step and no buffer")
        self.constant_names[id(value)] = self.names[node]

    def write_leaf(self, node: fx.Node) -> None:
        path, arguments, keywords = node.args
        assert isinstance(path, str)
        where = f"module {path!r}"
        given = self.convert_all(arguments, where)
        named = {key: self.convert(item, where) for key, item in keywords.items()}  # type: ignore[union-attr]
        self.names[node] = self.add(self.fresh(path), "layer", given, named, path)
        self.aliases.remember(node)
        for tensor in node.meta["mutated"]:
            self.aliases.change(node, self.names[node], tensor, where)
        self.detach_in_no_grad(node)

    def write_operator(self, node: fx.Node) -> None:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        where = str(target)
        if target.namespace != "aten":
            raise TraceError(
                f"the model calls {where} between its layers, which a plan cannot hold",
                hint="move the call into one of the model's layers",
            )
        given = self.convert_all(node.args, where)
        named = {key: self.convert(item, where) for key, item in node.kwargs.items()}
        self.names[node] = self.add(self.fresh(node.name), where, given, named)
        self.aliases.remember(node)
        for position, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = (
                    node.args[position]
                    if position < len(node.args)
                    else node.kwargs.get(argument.name)
                )
                if isinstance(changed, fx.Node):
                    self.aliases.change(node, self.names[node], changed.meta["val"], where)
        self.detach_in_no_grad(node)

    def detach_in_no_grad(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
        if is_tensor and not self.grad_enabled:
            source = Reference(self.names[node])
            name = self.fresh(f"{source.name}_detached")
            self.names[node] = self.add(name, "aten.detach.default", [source])

    def convert_all(self, values: Any, where: str) -> list[Any]:
        return [self.convert(value, where) for value in values]

    def convert(self, value: Any, where: str) -> Any:
        """The argument as a statement holds it."""
        kind = type(value)
        if isinstance(value, fx.Node):
            return self.refer(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return Symbol(str(value))
        if isinstance(value, torch.device):
            return Symbol("device")
        if isinstance(value, slice):
            return slice(*(self.convert(v, where) for v in (value.start, value.stop, value.step)))
        if kind in (list, tuple, torch.Size, fx.immutable_collections.immutable_list):
            items = self.convert_all(value, where)
            return tuple(items) if isinstance(value, tuple) else items
        if kind in (dict, fx.immutable_collections.immutable_dict) and _has_text_keys(value):
            return {key: self.convert(item, where) for key, item in value.items()}
        return self.rebuild(value, where)

    def rebuild(self, value: Any, where: str) -> Reference:
        """A value of a class that torch's pytree knows, through `unflatten`."""
        flat, spec = pytree.tree_flatten(value)
        text = _dumped(spec) if flat and flat[0] is not value else None
        if text is None:
            raise TraceError(
                f"{where} takes or gives an object of type {type(value).__name__}, "
                "which a plan cannot hold",
                hint=f"use {PLAIN_VALUES}; or list the layers: `layers = [...]` in the model file",
            )
        leaves = self.convert_all(flat, where)
        return Reference(self.add(self.fresh("rebuilt"), "unflatten", [text, leaves]))

    def refer(self, node: fx.Node) -> Reference:
        change = self.aliases.changed_by.pop(node, None)
        if change is not None:
            pair = (Reference(self.names[node]), Reference(change))
            name = self.fresh(f"{self.names[node]}_changed")
            self.names[node] = self.add(name, "getitem", [pair, 0])
        return Reference(self.names[node])

    def select_loss(self, output: Any) -> None:
        node = _find_loss(output)
        if node is None:
            raise TraceError(
                "there is no loss_fn, and the model returns no scalar loss",
                hint="add `def loss_fn(output, batch)` to the model file, or return the loss",
            )
        self.add("loss", "getitem", [(self.refer(node),), 0])


def _values(constant: torch.Tensor) -> Any:
    # A tensor inside a function transform, such as torch.vmap, has no values.
    with contextlib.suppress(RuntimeError):
        if is_known_constant(constant):
            return constant.tolist()
    raise TraceError(
        f"the model uses a tensor of shape {tuple(constant.shape)} between its layers whose "
        "values cannot be known when it is planned",
        hint="move the computation into an nn.Module of its own, which returns it: layers run as "
        "they are",
    )


def _has_text_keys(value: Mapping[Any, Any]) -> bool:
    return all(type(key) is str for key in value)


def _find_loss(output: Any) -> fx.Node | None:
    candidates = [output]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    candidates.append(getattr(output, "loss", None))
    if isinstance(output, (tuple, list)) and output:
        candidates.append(output[0])
    for value in candidates:
        if isinstance(value, fx.Node) and _is_scalar(value.meta.get("val")):
            return value
    return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point()


def _dumped(spec: pytree.TreeSpec) -> str | None:
    """The specification as text; None where a class in it has no name to be found by, or where
    reading it back would import a module (enumerations, factories of a defaultdict)."""
    try:
        text = pytree.treespec_dumps(spec)
    except NotImplementedError:
        return None
    return text if is_plain_specification(text) else None
