"""Micro-batch size as a variable: counts at two sizes give each figure's straight line.

The lines are found layer by layer and checked at a third size. A layer that breaks them (another
algorithm for another size, a peak at another moment) has none, and is counted at the size asked.
Everything is exact: a figure is on its line, or the layer has no law. This module knows counts. It
does not know operators.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from planner.measure.measure import measure
from planner.measure.summary import summary
from planner.profile import Profile
from planner.trace import TracedModel

__all__ = ["MicroBatchLaw", "fit_law"]

_SIZES = (2, 3, 5)
"""Not 1, at which kernels that differ at any other size may be alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLaw:
    """Profiles of a traced model at any micro-batch size."""

    sizes: tuple[int, int, int]
    """Micro-batch sizes at which it was counted: two make the lines, the third checked them."""
    broken: tuple[str, ...]
    """Layers that have no law."""
    traced: TracedModel
    first: Profile
    """Kernel by kernel."""
    second: Profile

    def profile(self, micro_batch_size: int) -> Profile:
        """From the lines where all layers have them, else counted.

        Between and beyond the sizes that were counted the lines are a prediction: a library may
        change its algorithm anywhere.
        """
        if self.broken:
            return measure(self.traced, micro_batch_size)
        pairs = zip(self.first.layers, self.second.layers, strict=True)
        layers = [_on_line(one, two, *self.sizes[:2], micro_batch_size) for one, two in pairs]
        return Profile(micro_batch_size=micro_batch_size, layers=tuple(map(summary, layers)))


def fit_law(traced: TracedModel, sizes: tuple[int, int, int] = _SIZES) -> MicroBatchLaw:
    """The lines through the counts at two micro-batch sizes, checked at the third.

    Raises:
        TraceError, ModelFileError: the model cannot be traced or run at one of the sizes.
    """
    first, second, third = (measure(traced, size, in_short=False) for size in sizes)
    broken = [
        one.name
        for one, two, three in zip(first.layers, second.layers, third.layers, strict=True)
        if _on_line(one, two, *sizes) != three
    ]
    return MicroBatchLaw(
        sizes=sizes, broken=tuple(broken), traced=traced, first=first, second=second
    )


def _on_line(one: Any, two: Any, first: int, second: int, size: int) -> Any:
    """The value at `size` of what is `one` and `two` at the first and the second size.

    None where the two are not alike, or a count would not be a whole number.
    """
    if isinstance(one, int) and isinstance(two, int) and not isinstance(one, bool):
        slope, rest = divmod((two - one) * (size - first), second - first)
        return None if rest else one + slope
    if type(one) is not type(two):
        return None
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        found = {n: _on_line(getattr(one, n), getattr(two, n), first, second, size) for n in names}
        if any(found[name] is None and getattr(one, name) is not None for name in names):
            return None
        return replace(one, **found)
    if isinstance(one, tuple):
        if len(one) != len(two):
            return None
        values = [_on_line(a, b, first, second, size) for a, b in zip(one, two, strict=True)]
        lost = any(v is None and a is not None for v, a in zip(values, one, strict=True))
        return None if lost else tuple(values)
    return one if one == two else None
