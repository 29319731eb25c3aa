"""Straight-line code of a stage: the glue between the user's own layers, as text in the plan.

A statement assigns the value of one call to a name, and prints as one line of Python syntax:

    t3 = layer('transformer.h.0')(t2, attention_mask=None)
    t4 = aten.add.Tensor(t3, t1)

It is parsed through `ast` and never evaluated: only the functions listed at `FUNCTIONS`, the
`aten.*` operators and calls of the model's own layers exist. This module knows the syntax. It does
not know torch, nor what a function does.
"""

import ast
import json
import math
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from planner.errors import PlanFileError

__all__ = [
    "FUNCTIONS",
    "Reference",
    "Statement",
    "Symbol",
    "is_plain_specification",
    "parse_statement",
    "references",
]

FUNCTIONS = (
    "layer",  # path of a module in the user's model, then the module's own arguments
    "batch",  # key of the batch
    "parameter",  # name of a parameter used outside any layer
    "buffer",  # name of a buffer used outside any layer
    "tensor",  # nested list of numbers, dtype: a small constant of the trace
    "getitem",  # value, index or key
    "getattr",  # value, public attribute name
    "unflatten",  # pytree specification (JSON), list of leaves
    "loss",  # model output -> scalar loss (calls the user's loss_fn with the batch)
)
_MAX_CHARACTERS = 500_000
"""Of a statement: the longest hold the small constants of a trace, a few thousand numbers."""
_MAX_INTEGER = 2**64
_RANDOM = re.compile(r"  # random ([0-9]{1,18}) ([0-9]{1,18})\Z")
_ATEN = re.compile(r"aten\.[a-z_A-Z0-9]+\.[a-z_A-Z0-9]+")
_SYMBOL = re.compile(r"torch\.[a-z_0-9]+|device")


@dataclass(frozen=True, slots=True)
class Reference:
    """The value of an earlier statement, or a tensor from another stage."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A torch constant such as `torch.float32`, or `device`: the rank's own device."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One call, its result assigned to a name."""

    target: str
    """Name the result is assigned to; unique in the whole model."""
    function: str
    """One of FUNCTIONS, or `aten.<operator>.<overload>`."""
    path: str = ""
    """For `layer` only: the module's path in the user's model."""
    arguments: tuple[Any, ...] = ()
    """References, symbols, constants, and lists, tuples, dicts and slices of those."""
    keywords: tuple[tuple[str, Any], ...] = ()
    """Keyword arguments, in order."""
    first_random_operator: int = 0
    """Ordinal, in one whole forward of the model, of the first random operator this call runs."""
    num_random_operators: int = 0
    """How many random operators (dropout, ...) the call runs."""

    def __str__(self) -> str:
        head = f"layer({self.path!r})" if self.function == "layer" else self.function
        words = [_print(argument) for argument in self.arguments]
        words += [f"{key}={_print(value)}" for key, value in self.keywords]
        random = ""
        if self.num_random_operators:
            random = f"  # random {self.first_random_operator} {self.num_random_operators}"
        return f"{self.target} = {head}({', '.join(words)}){random}"


def references(value: Any) -> list[str]:
    """Names referred to anywhere inside a statement or an argument, in order of appearance."""
    match value:
        case Reference(name=name):
            return [name]
        case Statement():
            found = [references(argument) for argument in value.arguments]
            found += [references(argument) for _, argument in value.keywords]
        case list() | tuple():
            found = [references(item) for item in value]
        case dict():
            found = [references(item) for item in value.values()]
        case slice():
            found = [references(item) for item in (value.start, value.stop, value.step)]
        case _:
            return []
    return [name for names in found for name in names]


def _print(value: Any) -> str:
    match value:
        case Reference(name=name):
            return name
        case Symbol(text=text):
            return text
        case float() if not math.isfinite(value):
            return f"float({str(value)!r})"
        case list():
            return "[" + ", ".join(map(_print, value)) + "]"
        case tuple():
            return "(" + ", ".join(map(_print, value)) + ("," if len(value) == 1 else "") + ")"
        case dict():
            return "{" + ", ".join(f"{k!r}: {_print(v)}" for k, v in value.items()) + "}"
        case slice():
            return f"slice({_print(value.start)}, {_print(value.stop)}, {_print(value.step)})"
        case None | bool() | int() | float() | str():
            return repr(value)
    raise TypeError(f"a statement cannot hold {value!r} of type {type(value).__name__}")


def is_plain_specification(text: str) -> bool:
    """Whether a pytree specification names no module: torch imports those it names.

    It is JSON, and so are the `context` texts in it.
    """

    def refuse_modules(mapping: dict[str, Any]) -> None:
        if "__enum__" in mapping or "default_factory_module" in mapping:
            raise TypeError
        if isinstance(context := mapping.get("context"), str):
            with suppress(ValueError):
                json.loads(context, object_hook=refuse_modules)

    try:
        json.loads(text, object_hook=refuse_modules)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def parse_statement(text: str) -> Statement:
    """Read one line back; `parse_statement(str(s)) == s`.

    Raises:
        PlanFileError: the line is not one assignment of one permitted call.
    """
    found = _RANDOM.search(text)
    first, num = (int(found[1]), int(found[2])) if found else (0, 0)
    code = text[: found.start()] if found else text
    if len(code) > _MAX_CHARACTERS:
        raise _bad(text, "it is too long")
    try:
        return _parse_assignment(code, first, num)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _bad(text, "it is not Python syntax") from None


def _parse_assignment(text: str, first: int, num: int) -> Statement:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of doubtful literals: a SyntaxError then
        body = ast.parse(text).body
    match body:
        case [ast.Assign(targets=[ast.Name(id=target)], value=ast.Call() as call)]:
            pass
        case _:
            raise _bad(text, "it is not one assignment of one call")
    function, path = _parse_function(call.func, text)
    keywords = []
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _bad(text, "`**` is not allowed")
        keywords.append((keyword.arg, _parse_value(keyword.value, text)))
    arguments = tuple(_parse_value(argument, text) for argument in call.args)
    match function, arguments:
        case "getattr", (_, str(name)) if not name.startswith("_"):
            pass
        case "unflatten", (str(specification), _) if is_plain_specification(specification):
            pass
        case (("getattr" | "unflatten"), _):
            raise _bad(text, "its arguments are not allowed")
    return Statement(
        target=target,
        function=function,
        path=path,
        arguments=arguments,
        keywords=tuple(keywords),
        first_random_operator=first,
        num_random_operators=num,
    )


def _parse_function(node: ast.expr, text: str) -> tuple[str, str]:
    match node:
        case ast.Call(func=ast.Name(id="layer"), args=[ast.Constant(value=str(path))], keywords=[]):
            return "layer", path
        case ast.Name(id=name) if name in FUNCTIONS and name != "layer":
            return name, ""
        case ast.Attribute() if _ATEN.fullmatch(name := ast.unparse(node)):
            if "from_file" in name:
                raise _bad(text, "aten.from_file is not allowed")
            return name, ""
    raise _bad(text, f"function {ast.unparse(node)[:60]!r} is not allowed")


def _parse_value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int(value)) if value > _MAX_INTEGER:
            raise _bad(text, "it holds a number that is too large")
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_parse_value(node.operand, text)
        case ast.Name(id="device"):
            return Symbol("device")
        case ast.Name(id=name):
            return Reference(name)
        case ast.Attribute() if _SYMBOL.fullmatch(symbol := ast.unparse(node)):
            return Symbol(symbol)
        case ast.List(elts=items):
            return [_parse_value(item, text) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_parse_value(item, text) for item in items)
        case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
            read = [_parse_value(item, text) for item in (*filter(None, keys), *values)]
            return dict(zip(read[: len(keys)], read[len(keys) :], strict=True))
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str(number))]):
            if number in ("inf", "-inf", "nan"):
                return float(number)
        case ast.Call(func=ast.Name(id="slice"), args=[start, stop, step]):
            return slice(*(_parse_value(item, text) for item in (start, stop, step)))
    raise _bad(text, f"argument {ast.unparse(node)[:60]!r} is not allowed")


def _bad(text: str, why: str) -> PlanFileError:
    return PlanFileError(
        f"the plan holds the statement {text[:120]!r}, but {why}",
        hint="make the plan again with lga-plan",
    )
