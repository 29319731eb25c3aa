"""Run statements one by one on a model, fake or real.

It does not know stages, gradients or transfers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.plan.code import Statement, references
from planner.plan.meaning import fill, function_of, template_of

__all__ = ["Context", "evaluate", "execute", "run_statements"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What statements refer to beside each other."""

    model: nn.Module
    batch: Mapping[str, torch.Tensor]
    loss_fn: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None
    device: torch.device


def run_statements(
    code: Sequence[Statement], values: dict[str, Any], context: Context, keep: Sequence[str]
) -> None:
    """Execute in order, adding to `values`; a value not in `keep` is dropped after its last use."""
    for statement, finished in zip(code, _last_uses(code, set(keep)), strict=True):
        values[statement.target] = execute(statement, values, context)
        for name in finished:
            del values[name]


def _last_uses(code: Sequence[Statement], keep: set[str]) -> Iterator[list[str]]:
    remaining: list[list[str]] = []
    seen = set(keep)
    for statement in reversed(code):
        names = dict.fromkeys([statement.target, *references(statement)])
        remaining.append([name for name in names if name not in seen])
        seen.update(names)
    return reversed(remaining)


def execute(statement: Statement, values: Mapping[str, Any], context: Context) -> Any:
    """The value of one statement."""
    arguments = [evaluate(argument, values, context) for argument in statement.arguments]
    keywords = {key: evaluate(item, values, context) for key, item in statement.keywords}
    return function_of(statement, context)(*arguments, **keywords)


def evaluate(value: Any, values: Mapping[str, Any], context: Context) -> Any:
    """An argument with values in place of references and torch objects in place of symbols."""
    return fill(template_of(value, context.device), values)
