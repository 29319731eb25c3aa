"""Compiles what stages call, the model's layers and its loss, with torch.compile.

Each is compiled whole or runs as it is, and why it does is kept. Layers of one class that lie alike
in memory share what is compiled. What a stage computes between its layers runs as it is. This
module knows functions and torch.compile. It does not know when anything runs.
"""

import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from planner.plan.types import Opcode, Plan
from runtime.backends import check_backend

__all__ = [
    "CompileReport", "Compiled", "Compiler", "EagerPart", "Phase", "reasons_to_run_eagerly",
]  # fmt: skip

_ALIGNMENT_BYTES = 16
"""Of the widest load: inductor takes for granted that a parameter stays aligned as it was."""
_MOST_NAMES = 5
"""Stages or layers named in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerPart:
    """What runs without being compiled."""

    stage: int
    what: str
    """A layer, the loss, or empty: all that the stage calls."""
    reason: str

    @property
    def name(self) -> str:
        return f"{self.what} of stage {self.stage}" if self.what else f"stage {self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """What became of all ranks' stages."""

    backend: str
    num_graphs: tuple[int, ...]
    """By world rank: forward graphs compiled so far; layers that are alike share one."""
    eager: tuple[EagerPart, ...]
    """By stage, each once for all replicas."""

    def __str__(self) -> str:
        return f"compiled with {self.backend}: {sum(self.num_graphs)} graphs on all ranks"

    def explain(self, known: Sequence[EagerPart] = ()) -> Iterator[str]:
        """What runs eagerly, but for what is `known` to: a line for each reason."""
        names: dict[str, list[str]] = {}
        for part in self.eager:
            if part not in known:
                names.setdefault(part.reason, []).append(part.name)
        for reason, found in names.items():
            more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
            yield f"not compiled: {', '.join(found[:_MOST_NAMES])}{more}: {reason}"


class Phase(Enum):
    """Of one rank's compilation."""

    COMPILING = "compiling"
    """First calls: what fails runs eagerly from then on."""
    CHECKING = "checking"
    """Second calls: what is compiled anew would be at every call, so it runs eagerly."""
    READY = "ready"
    """Steps are taken: nothing should be compiled any more."""


class Compiler:
    """One rank's use of torch.compile."""

    def __init__(self, backend: str, device: torch.device, places: Mapping[int, int]) -> None:
        """
        Args:
            backend: a name that torch.compile knows.
            device: where the rank computes.
            places: id() of a parameter -> bytes before it in its unit's flat vector.

        Raises:
            UsageError: there is no such backend, or it lacks the compiler that it needs.
        """
        check_backend(backend, device)
        self.backend = backend
        self.phase = Phase.COMPILING
        self.num_graphs = 0
        self._compile = torch._dynamo.lookup_backend(backend)
        self._places = places
        self._alike: dict[object, tuple[Callable[..., Any], list[Compiled]]] = {}
        """What is compiled for several, and those that share it."""

    def compiled(self, function: Callable[..., Any], name: str) -> "Compiled":
        """What a stage calls instead of `function`; nothing is compiled yet.

        Args:
            function: a layer or the loss.
            name: of it, for messages.
        """
        key: object = id(function)
        if isinstance(function, torch.nn.Module):
            places = (self._places.get(id(p), 0) for p in function.parameters())
            key = type(function), tuple(place % _ALIGNMENT_BYTES for place in places)
        if key not in self._alike:
            code = _call.__code__.replace(co_name=f"_call_{len(self._alike)}")
            shared = torch.compile(
                types.FunctionType(code, globals()),  # torch keeps what it compiled by code object
                backend=self._backend,
                fullgraph=True,
                dynamic=False,
            )
            self._alike[key] = shared, []
        shared, alike = self._alike[key]
        alike.append(Compiled(self, function, shared, name, alike))
        return alike[-1]

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.num_graphs += 1
        if self.phase is Phase.READY:
            warnings.warn(
                "a layer or the loss was compiled again in the middle of training, which costs "
                "time; TORCH_LOGS=recompiles says why",
                stacklevel=2,
            )
        return self._compile(graph, inputs)


class Compiled:
    """A layer or the loss of one stage."""

    def __init__(
        self,
        compiler: Compiler,
        function: Callable[..., Any],
        shared: Callable[..., Any],
        name: str,
        alike: "list[Compiled]",
    ) -> None:
        """
        Args:
            compiler: that counts what is compiled.
            function: the layer or the loss itself.
            shared: calls it, compiled.
            name: of it, for messages.
            alike: all that `shared` is for.
        """
        self.name = name
        self.reason = ""
        """Why it runs eagerly, if it does."""
        self._compiler, self._function, self._shared = compiler, function, shared
        self._alike = alike

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        # Under a dispatch mode, such as a counter of the user's, torch compiles nothing, and would
        # let the code go uncompiled ever after.
        if self.reason or torch._C._len_torch_dispatch_stack():
            return self._function(*arguments, **keywords)
        if self._compiler.phase is Phase.READY:
            return self._shared(self._function, arguments, keywords)
        return self._try(arguments, keywords)

    def give_up(self, error: Exception) -> None:
        """It runs eagerly from now on."""
        self.reason = self.reason or f"it could not be compiled ({_first_line(error)})"

    def _try(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        compiler = self._compiler
        before = compiler.num_graphs
        inputs = _changeable(self._function, arguments, keywords)
        versions = [tensor._version for tensor in inputs]
        try:
            result = self._shared(self._function, arguments, keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.give_up(error)
            return self._function(*arguments, **keywords)
        if compiler.phase is Phase.CHECKING and compiler.num_graphs > before:
            for each in self._alike:  # they may have found what was just compiled for this one
                each.reason = each.reason or "it would be compiled anew at every call"
        if versions != [tensor._version for tensor in inputs]:
            # Torch (2.13) may then find gradients from what is there after the change.
            self.reason = "it changes in place a buffer or a tensor that it is given"
        return result


def _changeable(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> list[torch.Tensor]:
    """Tensors that a call must not change in place: what it is given, and buffers of the layer.

    Those of torch's own batch normalisation may change: its gradient does not depend on them.
    """
    found = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
    if isinstance(function, torch.nn.Module):
        for module in function.modules():
            if getattr(type(module), "forward", None) is not _BatchNorm.forward:
                found += [x for x in module._buffers.values() if x is not None]
    return found


def reasons_to_run_eagerly(plan: Plan, rank: int) -> dict[int, str]:
    """Stages of a pipeline rank that had better not be compiled, and why."""
    halved = {i.stage for i in plan.programs[rank] if i.opcode is Opcode.BACKWARD_INPUT}
    found = {}
    for stage in plan.stages:
        if stage.rank != rank:
            continue
        if any(statement.num_random_operators for statement in stage.code):
            found[stage.index] = "its random operators are keyed one by one as they are called"
        elif stage.index in halved:
            found[stage.index] = (
                "its backward is split, and compiled each half takes as long as both"
            )
    return found


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    return function(*arguments, **keywords)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
