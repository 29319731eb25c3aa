"""Buffers of modules that a forward changes: running statistics, averages, power iterations.

A recomputed forward must read what the first one read, and must leave no trace. Which buffers
change is seen in a stage's first forward. This module knows modules. It does not know autograd.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from planner.errors import UsageError

__all__ = ["ModuleBuffers"]

_Place = tuple[nn.Module, str]


class ModuleBuffers:
    """The buffers of one stage's modules."""

    def __init__(self, modules: Sequence[nn.Module], shared: Sequence[nn.Module]) -> None:
        """
        Args:
            modules: of the stage.
            shared: those of them that other stages call too.
        """
        self._places = [
            (module, name)
            for module in modules
            for name, value in module._buffers.items()
            if value is not None
        ]
        self._shared = {id(module): module for module in shared}
        self._changing: list[_Place] | None = None
        self._before: dict[int, list[Tensor]] = {}
        """By micro-batch: values of changing buffers before a forward not recomputed yet."""

    @property
    def are_known(self) -> bool:
        """Whether a forward has shown which of them change."""
        return self._changing is not None

    def tensors(self) -> list[Tensor]:
        """As they are now."""
        values = (module._buffers[name] for module, name in self._places)
        return [value for value in values if value is not None]

    @contextmanager
    def noted(self, keep_for: int | None) -> Iterator[None]:
        """Around a forward; `restored` gives micro-batch `keep_for` again what it read.

        Raises:
            UsageError: a buffer changes that other stages change or read too: plain training
                changes it in an order that a plan does not keep.
        """
        places = self._places if self._changing is None else self._changing
        noting = keep_for is not None or self._changing is None
        before = _values(places) if noting else []
        yield
        if self._changing is None:
            found = zip(places, before, strict=True)
            self._changing = [p for p, old in found if not _same(old, p[0]._buffers[p[1]])]
            before = [o for p, o in zip(places, before, strict=True) if p in self._changing]
            self._refuse_shared()
        if keep_for is not None:
            self._before[keep_for] = before

    @contextmanager
    def restored(self, micro_batch: int) -> Iterator[None]:
        """Around a recomputed forward: on copies, because graphs may hold the originals."""
        places = self._changing or []
        value: Tensor | None
        originals = [module._buffers[name] for module, name in places]
        for (module, name), value in zip(places, self._before.pop(micro_batch), strict=True):
            module._buffers[name] = value
        try:
            yield
        finally:
            for (module, name), value in zip(places, originals, strict=True):
                module._buffers[name] = value

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a forward that must leave no trace and shows nothing: on made-up samples."""
        originals = [module._buffers[name] for module, name in self._places]
        before = _values(self._places)
        try:
            yield
        finally:
            for (module, name), original, value in zip(
                self._places, originals, before, strict=True
            ):
                assert original is not None
                original.detach().copy_(value)
                module._buffers[name] = original

    def apart(self, tensor: Tensor) -> Tensor:
        """A stage's output, copied if it is a view of a buffer that the next forward changes."""
        places = self._places if self._changing is None else self._changing
        if not places:
            return tensor
        address = tensor.untyped_storage().data_ptr()
        buffers = (module._buffers[name] for module, name in places)
        held = {b.untyped_storage().data_ptr() for b in buffers if b is not None}
        return tensor.clone() if address in held else tensor

    def _refuse_shared(self) -> None:
        for module, name in self._changing or ():
            if id(module) in self._shared:
                raise UsageError(
                    f"several stages call one {type(module).__name__}, which changes its buffer "
                    f"{name!r} whenever it is called",
                    hint="plan with fewer stages, so that one stage makes all its calls, or build "
                    "a module for each call",
                )


def _values(places: Sequence[_Place]) -> list[Tensor]:
    """Copies; a buffer that two modules share is copied once."""
    copies: dict[int, Tensor] = {}
    found = []
    for module, name in places:
        value = module._buffers[name]
        assert value is not None
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone()
        found.append(copies[id(value)])
    return found


def _same(old: Tensor, new: Tensor | None) -> bool:
    return new is not None and torch.equal(old, new)
