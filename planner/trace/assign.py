"""Which layer every statement belongs to.

A call of a module with parameters begins a layer; other statements join the layer of the latest
of their inputs, so that makers precede readers. Statements of the batch and constants alone form
the prologue. This module knows references and facts. It does not know torch.
"""

from collections.abc import Sequence

from planner.plan.code import Statement, references
from planner.trace.analyse import Facts

__all__ = ["PROLOGUE", "assign_layers", "live_statements"]

PROLOGUE = -1

# Placed beside their readers: a parameter belongs to the layer that uses it, and a rebuilt object
# is no tensor, so it cannot pass between layers.
_BESIDE_READER = ("parameter", "unflatten")


def live_statements(statements: Sequence[Statement]) -> list[int]:
    """Indices of the statements that the last one depends on, ascending."""
    needed = {statements[-1].target}
    live: list[int] = []
    for index in range(len(statements) - 1, -1, -1):
        if statements[index].target in needed:
            live.append(index)
            needed.update(references(statements[index]))
    return live[::-1]


def assign_layers(
    statements: Sequence[Statement], facts: Sequence[Facts], begins: Sequence[bool]
) -> list[int]:
    """Layer index of every (live) statement, PROLOGUE for the prologue.

    Args:
        begins: per statement, whether it calls a module with parameters.
    """
    positions = {statement.target: index for index, statement in enumerate(statements)}
    inputs = [
        [positions[name] for name in dict.fromkeys(references(statement))]
        for statement in statements
    ]
    pure = _pure(statements, facts, begins, inputs)
    layers = _latest_input(facts, begins, inputs, pure)
    readers: list[list[int]] = [[] for _ in statements]
    for index, sources in enumerate(inputs):
        for source in sources:
            readers[source].append(index)
    for index in range(len(statements) - 1, -1, -1):
        beside = statements[index].function in _BESIDE_READER and not pure[index]
        if (beside or layers[index] is None) and readers[index]:
            layers[index] = min(layers[reader] or 0 for reader in readers[index])
    return [PROLOGUE if pure[i] else layer or 0 for i, layer in enumerate(layers)]


def _pure(
    statements: Sequence[Statement],
    facts: Sequence[Facts],
    begins: Sequence[bool],
    inputs: Sequence[Sequence[int]],
) -> list[bool]:
    pure: list[bool] = []
    last = len(statements) - 1
    for index, statement in enumerate(statements):
        pure.append(
            statement.function not in ("parameter", "loss")
            and index != last
            and not begins[index]
            and not facts[index].num_random_operators
            and not facts[index].changes_buffers
            and all(pure[source] for source in inputs[index])
        )
    return pure


def _latest_input(
    facts: Sequence[Facts],
    begins: Sequence[bool],
    inputs: Sequence[Sequence[int]],
    pure: Sequence[bool],
) -> list[int | None]:
    """The rule of the latest input; None where no input comes from a layer."""
    layers: list[int | None] = []
    touched: dict[int, int] = {}
    """Storage -> latest layer that has used it: a change must not overtake an earlier reader."""
    num_layers = 0
    for index, sources in enumerate(inputs):
        known = [layer for source in sources if (layer := layers[source]) is not None]
        known += [touched[s] for s in facts[index].changed_storages if s in touched]
        layer = max(known, default=None)
        if begins[index]:
            layer, num_layers = num_layers, num_layers + 1
        if pure[index]:
            layer = None
        layers.append(layer)
        if layer is not None:
            used = facts[index].storages.union(*(facts[source].storages for source in sources))
            for storage in used:
                touched[storage] = max(touched.get(storage, 0), layer)
    return layers
