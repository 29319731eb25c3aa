"""A model whose parameters have no values until a layer needs them, and whose buffers have theirs.

So one layer of a model can be run that would never fit as a whole. It knows modules and memory. It
does not know layers or time.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from planner.compute_type import to_compute_type
from planner.errors import ModelFileError
from planner.model_file import ModelFile, build_on_meta, raised_at
from planner.precision import Precision

__all__ = ["RealModel", "random_values"]

_SPREAD = 0.02
"""Standard deviation of weights: small enough for activations that neither grow nor vanish."""


class RealModel:
    """Built as the user builds it, except that parameters lose their values at once."""

    def __init__(
        self,
        model_file: ModelFile,
        precision: Precision = Precision.MODEL,
        keep_float32: Sequence[str] = (),
    ) -> None:
        """In its compute type, where the precision is mixed.

        Raises:
            ModelFileError: `build_model` fails.
        """
        build_on_meta(model_file.build_model, model_file.name)  # the errors a plan would give
        self._model = to_compute_type(_build(model_file), precision, keep_float32)

    def with_parameters(self, names: Collection[str], device: torch.device) -> nn.Module:
        """A copy in train mode whose parameters `names`, and all of its buffers, are on `device`.

        Parameters get small random values: what a kernel takes does not depend on them.
        """
        wanted = {id(self._model.get_parameter(name)) for name in names}
        memo: dict[int, object] = {}
        for parameter in self._model.parameters():
            real = id(parameter) in wanted
            memo[id(parameter)] = (
                nn.Parameter(_on_device(parameter, device), parameter.requires_grad)
                if real
                else parameter
            )
        for tensor in _other_tensors(self._model):
            if id(tensor) not in memo:
                memo[id(tensor)] = _on_device(tensor, device)
        return copy.deepcopy(self._model, memo).train()


def random_values(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    spread: float = 1.0,
) -> torch.Tensor:
    """Normally distributed with standard deviation `spread`, also where elements share memory.

    Integers are 0 and booleans true: what can be looked up, and what is not masked.
    """
    length = 0
    if math.prod(shape):
        length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.float32 if dtype.itemsize < 2 else dtype  # 8 bits cannot be drawn
        flat = torch.randn(length, dtype=made, device=device).mul_(spread).to(dtype)
    else:
        flat = torch.full((length,), int(dtype is torch.bool), device=device).to(dtype)
    return flat.as_strided(shape, stride)


def _build(model_file: ModelFile) -> nn.Module:
    """On the CPU; whole where its construction reads values of parameters."""
    emptied = WeakIdKeyDictionary()

    def empty(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> object:
        if parameter is None or parameter.is_meta:
            return None
        if parameter not in emptied:  # a parameter that two modules share stays one
            emptied[parameter] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        return emptied[parameter]

    with torch.random.fork_rng(devices=[]):
        # What a hook returns takes the parameter's place; torch's annotation does not say so.
        hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
        try:
            return model_file.build_model()
        except Exception:  # its own errors were met on meta: this one is of the mixture
            pass
        finally:
            hook.remove()
        try:
            return model_file.build_model()
        except (Exception, SystemExit) as error:
            raise ModelFileError(
                f"build_model() of {model_file.name} raised {type(error).__name__} on the CPU: "
                f"{error}{raised_at(error)}",
                hint="correct build_model",
            ) from None


def _other_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Buffers, and tensors that are plain attributes of modules."""
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                yield value


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_meta:
        return random_values(tuple(tensor.shape), tensor.stride(), tensor.dtype, device, _SPREAD)
    return tensor.detach().to(device, copy=True)
