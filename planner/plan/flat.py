"""How the parameters of a unit lie in its flat vector, in the plan's figures and at run time.

Whole vectors start each parameter where its own tensor would be aligned, so that kernels compute on
views of them as on the user's own tensors. With partition 3 they are packed: with replicas nothing
is bitwise, and every byte of them travels in every pass.
"""

from collections.abc import Iterable

__all__ = ["flat_length", "flat_ranges", "moment_elements"]

_ALIGNMENT_BYTES = 64
"""Where torch's allocator starts tensors; kernels may choose their instructions by it."""


def flat_ranges(
    sizes: Iterable[int], element_bytes: int, *, is_packed: bool
) -> list[tuple[int, int]]:
    """First element and end of each of the parameters, which have `sizes` elements."""
    step = 1 if is_packed else _ALIGNMENT_BYTES // element_bytes
    found, end = list[tuple[int, int]](), 0
    for size in sizes:
        first = -(-end // step) * step
        end = first + size
        found.append((first, end))
    return found


def flat_length(sizes: Iterable[int], element_bytes: int, *, is_packed: bool) -> int:
    """Elements of the whole vector."""
    return max(
        (end for _, end in flat_ranges(sizes, element_bytes, is_packed=is_packed)), default=0
    )


def moment_elements(trained_sizes: Iterable[int], part_elements: int) -> int:
    """Elements that an optimizer keeps a moment of: at most, where a rank has a part of the vector.

    Moments are tensors of their own, of trained parameters alone, and there is no gap between them.
    """
    return min(part_elements, sum(trained_sizes))
