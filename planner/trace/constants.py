"""Constants among fake tensors: what code makes out of numbers alone keeps its values.

Positions, causal masks and index tables depend on sizes only. Kept real, code may ask for their
values, as it does in eager mode: then it takes the same branch, and calls the same kernel, as it
will when the plan runs. What depends on the batch, on weights or on random numbers stays fake. This
module knows operators. It does not know models.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.operators import is_random_operator

__all__ = ["RealConstants", "is_known_constant", "kept_state", "memory_of_constants_noted"]

_MAX_ELEMENTS = 1 << 20
"""Of a constant that is kept real: larger ones would cost memory and time."""
_UNDEFINED = tuple(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RealConstants(TorchDispatchMode):
    """Enter inside a FakeTensorMode: runs operators on constants for real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._changed: dict[int, torch.Tensor] = {}
        """Storage -> a real tensor on it that has been given values which are not known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        real = [x for x in leaves if isinstance(x, torch.Tensor) and not _is_fake(x)]
        num_tensors = sum(isinstance(x, torch.Tensor) for x in leaves)
        if len(real) == num_tensors and self._is_constant(func, real, args, kwargs):
            return self._run(func, args, kwargs)
        if not real:
            return self.run_fake(func, args, kwargs)
        result = self._run_mixed(func, real, args, kwargs)
        return self._note_changes(func, result, args, kwargs)

    def run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator on fake tensors."""
        return func(*args, **kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator on constants: real, unless what it makes is large."""
        if not func._schema.is_mutable and not any(tag in func.tags for tag in _READS):
            fake = self.run_fake(func, args, kwargs)
            made = [x for x in pytree.tree_leaves(fake) if isinstance(x, torch.Tensor)]
            if any(value.numel() > _MAX_ELEMENTS for value in made):
                return fake
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _run_mixed(self, func: Any, real: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        if all(tensor.grad_fn is None for tensor in real):
            return self.run_fake(func, args, kwargs)
        # An autograd function has returned a constant: torch warns when it makes a fake tensor of
        # a real one that has a gradient.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self.run_fake(func, args, kwargs)

    def _is_constant(self, func: Any, real: list[torch.Tensor], args: Any, kwargs: Any) -> bool:
        device = kwargs.get("device")
        return (
            (device is None or torch.device(device).type == "cpu")
            and func.overloadpacket not in _UNDEFINED
            and not is_random_operator(func, args, kwargs)
            and all(map(self._is_known, real))
        )

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return (
            tensor.device.type == "cpu"
            and not tensor.requires_grad
            and tensor.untyped_storage()._cdata not in self._changed
        )

    def _note_changes(self, func: Any, result: Any, args: Any, kwargs: Any) -> Any:
        """Forget the values of what was changed; in-place operators return what they change."""
        returned = result
        for tensor in _written(func, args, kwargs):
            if not _is_fake(tensor):
                self._changed[tensor.untyped_storage()._cdata] = tensor
                if func._schema.name.endswith("_") and tensor is args[0]:
                    returned = tensor
        return returned


@contextmanager
def memory_of_constants_noted() -> Iterator[None]:
    """Note real tensors themselves at their nodes: torch notes fake ones on memory of their own,
    from which nobody can tell which of them are views of one another."""
    plain_extract = proxy_tensor.extract_val

    def extract(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, torch.Tensor) and not _is_fake(value):
            return value
        return plain_extract(value, *args, **kwargs)

    proxy_tensor.extract_val = extract  # type: ignore[assignment]
    try:
        yield
    finally:
        proxy_tensor.extract_val = plain_extract


def is_known_constant(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are those that eager code finds in it; ask inside RealConstants."""
    return not _is_fake(tensor.detach())


def kept_state(model: nn.Module, leaves: Collection[str]) -> Iterator[str]:
    """Attributes outside the leaves in which a forward has left a real tensor after changing it.

    The next forward would go on from it. Made anew of numbers alone, it would be a table.
    """
    for path, module in model.named_modules():
        if not any(f"{path}.".startswith(f"{leaf}.") for leaf in leaves):
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and not _is_fake(value) and value._version:
                    yield f"{path}.{name}".lstrip(".")


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Tensors that the operator changes."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor))
