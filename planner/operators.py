"""What operators do that their arguments do not show: draw random numbers, change statistics.

The tracer counts random operators and the runtime reseeds before each of them, so both must agree
on every single one: this predicate is the only definition. It looks at an operator as a
`TorchDispatchMode` sees it. It does not know layers, plans or keys.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

__all__ = ["changed_statistics", "is_random_operator"]


def is_random_operator(
    func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether this call draws from the random generator.

    Operators carry torch's tag `nondeterministic_seeded`; attention operators carry it too, but
    draw only where their `dropout_p` is above zero.
    """
    draws = _draws(func)
    if isinstance(draws, bool):
        return draws
    position, default = draws
    given = args[position] if position < len(args) else kwargs.get("dropout_p")
    return bool(default if given is None else given)


@cache
def _draws(func: torch._ops.OpOverload) -> bool | tuple[int, float]:
    """Whether it always draws; where that depends on `dropout_p`, its position and default.

    Asked of every operator that runs under a dispatch mode, so the answer is kept.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return position, float(argument.default_value or 0.0)
    return True


def changed_statistics(
    func: torch._ops.OpOverload, args: Sequence[Any]
) -> tuple[torch.Tensor, ...]:
    """Running statistics that a batch normalisation in training changes.

    Its schema does not say so, and neither do the tensors' version counters.
    """
    if func is not torch.ops.aten.native_batch_norm.default or not args[5]:
        return ()
    return tuple(tensor for tensor in args[3:5] if tensor is not None)
