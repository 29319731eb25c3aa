"""Keyed randomness: what a random operator draws depends on what it is, not on when it runs.

Every random operator (dropout, ...) is reseeded with a key made of the run's seed, the step, the
replica, the micro-batch and the operator's ordinal in one whole forward of the model. So no
placement, order or recomputation changes a mask, and plain training in one process under the same
keys draws the same.

The ordinal is kept as the seed of torch's default CPU generator. So code that saves the generator's
state and restores it to run again, as torch.utils.checkpoint does in backward, draws again what it
drew.

It knows nothing of stages: whoever runs a part of the model says at which ordinal it begins.
"""

import hashlib
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.operators import is_random_operator

__all__ = ["KeyedRandom", "key_of", "seeded"]

_DEFAULT_GENERATORS = threading.RLock()
"""Ranks may share a process (`runtime.local`): seeding and drawing must not be torn apart."""
_LARGEST = (1 << 63) - 1
"""Of a number in a key; user code may seed the default generator with more."""


def key_of(*words: int) -> int:
    """A 63-bit key, equally spread whatever the words."""
    digest = hashlib.blake2b(struct.pack(f"<{len(words)}q", *words), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Torch's default generators start from `key` in the block, and are as before after it."""
    with _DEFAULT_GENERATORS, _seeded(key, device):
        yield


@contextmanager
def _seeded(key: int, device: torch.device) -> Iterator[None]:
    accelerated = device.type not in ("cpu", "meta")
    with torch.random.fork_rng([device] if accelerated else []):
        torch.manual_seed(key)
        yield


class KeyedRandom(TorchDispatchMode):
    """Reseeds every random operator that is dispatched inside it; one thread at a time."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_draws = 0
        """Random operators so far."""
        self._seed = seed
        self._context = (0, 0, 0)
        self._first = 0
        self._before: list[torch.Tensor] = []
        """States of the default generator, to go back to."""
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, *, step: int, replica: int, micro_batch: int, ordinal: int = 0) -> None:
        """What follows belongs to this step, replica and micro-batch."""
        self._context = (step, replica, micro_batch)
        self.seek(ordinal)

    def seek(self, ordinal: int) -> None:
        """The next random operator is the `ordinal`-th of the whole forward."""
        self._first = ordinal
        if self._before:
            torch.default_generator.manual_seed(ordinal)

    def __enter__(self) -> Self:
        _DEFAULT_GENERATORS.acquire()
        self._before.append(torch.get_rng_state())
        torch.default_generator.manual_seed(self._first)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_rng_state(self._before.pop())
        _DEFAULT_GENERATORS.release()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random_operator(func, args, kwargs):
            return func(*args, **kwargs)
        ordinal = torch.default_generator.initial_seed() & _LARGEST
        torch.default_generator.manual_seed(ordinal + 1)
        self.num_draws += 1
        key, device = key_of(self._seed, *self._context, ordinal), _device_of(args, kwargs)
        if _takes_generator(func):
            generator = self._generators.setdefault(device, torch.Generator(device))
            return func(*args, **{**kwargs, "generator": generator.manual_seed(key)})
        with _seeded(key, device):
            return func(*args, **kwargs)


@cache
def _takes_generator(func: torch._ops.OpOverload) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")
