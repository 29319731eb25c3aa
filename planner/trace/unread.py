"""Free calls from inputs that they never look at.

A rotary embedding takes the hidden states for their type and device alone. Left as it is, its
tables would be made on one rank and sent to all others; with a stand-in of the same type and shape
in place of the hidden states, it depends on the batch only and is recomputed where it is used.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from planner.plan.code import Reference, Statement, Symbol
from planner.trace.analyse import Analysis, Facts

__all__ = ["free_unread"]


def free_unread(
    statements: Sequence[Statement], analysis: Analysis
) -> tuple[list[Statement], Analysis]:
    """The same statements with stand-ins for unread inputs that need no gradient themselves."""
    specs = {s.target: f.spec for s, f in zip(statements, analysis.facts, strict=True)}
    code: list[Statement] = []
    facts: list[Facts] = []
    for statement, fact in zip(statements, analysis.facts, strict=True):
        stand_ins: dict[str, str] = {}
        for name in fact.unread:
            spec = specs[name]
            # A result with a gradient may owe it to parameters: then nothing is gained.
            if spec is None or _needs_gradient(statement.target, specs):
                continue
            stand_ins[name] = f"{statement.target}_like_{name}"
            added = _stand_in(stand_ins[name], spec.shape, spec.dtype)
            code += added
            facts += [_PLAIN] * len(added)
        code.append(_with_names(statement, stand_ins))
        facts.append(fact)
    return code, replace(analysis, facts=tuple(facts))


_PLAIN = Facts(
    spec=None,
    storages=frozenset(),
    changed_storages=frozenset(),
    changes_buffers=False,
    num_random_operators=0,
    operators=(),
    unread=(),
)


def _needs_gradient(target: str, specs: dict[str, Any]) -> bool:
    own = [spec for name, spec in specs.items() if name == target or name.startswith(f"{target}_")]
    return any(spec is not None and spec.requires_grad for spec in own)


def _stand_in(name: str, shape: tuple[int, ...], dtype: str) -> list[Statement]:
    """One element, expanded: it costs no memory."""
    zero = Statement(
        target=f"{name}_zero",
        function="aten.zeros.default",
        arguments=([],),
        keywords=(("dtype", Symbol(f"torch.{dtype}")), ("device", Symbol("device"))),
    )
    expanded = Statement(
        target=name,
        function="aten.expand.default",
        arguments=(Reference(zero.target), list(shape)),
    )
    return [zero, expanded]


def _with_names(value: Any, names: dict[str, str]) -> Any:
    match value:
        case Reference(name=name):
            return Reference(names.get(name, name))
        case Statement():
            return replace(
                value,
                arguments=tuple(_with_names(item, names) for item in value.arguments),
                keywords=tuple((key, _with_names(item, names)) for key, item in value.keywords),
            )
        case list() | tuple():
            return type(value)(_with_names(item, names) for item in value)
        case dict():
            return {key: _with_names(item, names) for key, item in value.items()}
    return value
