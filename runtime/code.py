"""Runs a stage's statements over the user's own modules.

The statements are resolved once, when the plan is loaded: module paths to modules, operator names
to operators, argument templates to getters. A value is dropped at its last use, so that memory is
what the profile counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planner.errors import PlanFileError
from planner.plan.code import Reference, Statement, references
from planner.plan.meaning import fill, function_of, template_of
from runtime.compile import Compiled, Compiler
from runtime.random import KeyedRandom

__all__ = ["LossFunction", "StageProgram"]

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]
Values = dict[str, Any]

_OF_TRAINING: dict[str, Any] = {
    "train": False, "training": False, "use_input_stats": False, "dropout_p": 0.0
}  # fmt: skip
"""Arguments by which operators are told to act as in training, and what they are in evaluation."""


@dataclass(slots=True)
class _Call:
    """A statement whose arguments are not all values."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    evaluation_arguments: tuple[Any, ...]
    """As `arguments` and `keywords`, with what acts in training only switched off."""
    evaluation_keywords: dict[str, Any]

    def run(self, values: Values, *, training: bool) -> Any:
        arguments = self.arguments if training else self.evaluation_arguments
        keywords = self.keywords if training else self.evaluation_keywords
        return self.function(
            *[fill(argument, values) for argument in arguments],
            **{key: fill(value, values) for key, value in keywords.items()},
        )


class _Line(NamedTuple):
    """A statement, ready to run."""

    target: str
    function: Callable[..., Any]
    reads: tuple[str, ...]
    """Names of the arguments, where these are values."""
    call: _Call | None
    """Where they are not."""
    first_random_operator: int | None
    dead: tuple[str, ...]
    """Values that no later statement reads."""


class StageProgram:
    """The code of one stage, ready to run."""

    def __init__(
        self,
        code: Sequence[Statement],
        outputs: Sequence[str],
        model: torch.nn.Module,
        device: torch.device,
        random: KeyedRandom,
        loss_fn: LossFunction | None,
        compiler: Compiler | None = None,
    ) -> None:
        """Resolve every name; a compiler takes the layers and the loss.

        Raises:
            PlanFileError: a module, parameter, buffer or operator does not exist.
        """
        self._outputs = tuple(outputs)
        self.model, self.device = model, device
        self._compiler = compiler
        self.compiled: list[Compiled] = []
        """What `compiler` was given."""
        self.loss_fn = loss_fn
        if loss_fn is not None and any(statement.function == "loss" for statement in code):
            self.loss_fn = self._compiled(loss_fn, "the loss")
        self.batch: Mapping[str, Tensor] = {}
        self._random = random
        self._lines: list[_Line] = []
        later: set[str] = set(outputs)
        for statement in reversed(code):
            read = set(references(statement))
            dead = tuple((read | {statement.target}) - later)
            later |= read
            self._lines.append(self._resolve(statement, dead))
        self._lines.reverse()
        self.is_random = any(statement.num_random_operators for statement in code)

    def __call__(
        self, inputs: Values, batch: Mapping[str, Tensor], *, training: bool = True
    ) -> Values:
        """Values of the outputs; `inputs` is consumed.

        Layers act as their own mode says; `training` is for operators between them.
        """
        self.batch = batch
        values = inputs
        for target, function, reads, call, first_random_operator, dead in self._lines:
            if first_random_operator is not None:
                self._random.seek(first_random_operator)
            if call is not None:
                values[target] = call.run(values, training=training)
            elif len(reads) == 1:
                values[target] = function(values[reads[0]])
            else:
                values[target] = function(*[values[name] for name in reads])
            for name in dead:
                del values[name]
        self.batch = {}
        return {name: values[name] for name in self._outputs}

    def _resolve(self, statement: Statement, dead: tuple[str, ...]) -> _Line:
        try:
            function = function_of(statement, self)
        except (AttributeError, RuntimeError) as error:
            raise PlanFileError(
                f"the plan's statement `{statement}` refers to something that this model or this "
                f"torch does not have: {error}",
                hint="make the plan again with lga-plan for this model",
            ) from None
        if statement.function == "layer":
            function = self._compiled(function, f"layer {statement.path!r}")
        arguments = tuple(template_of(a, self.device) for a in statement.arguments)
        keywords = {key: template_of(value, self.device) for key, value in statement.keywords}
        reads = tuple(a.name for a in arguments if isinstance(a, Reference))
        call = None
        if statement.function == "batch":
            function = partial(function, *arguments)
        elif len(reads) < len(arguments) or keywords:
            evaluation = _for_evaluation(function, arguments, keywords)
            call = _Call(function, arguments, keywords, *evaluation)
        return _Line(
            target=statement.target,
            function=function,
            reads=reads,
            call=call,
            first_random_operator=(
                statement.first_random_operator if statement.num_random_operators else None
            ),
            dead=dead,
        )

    def _compiled(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        if self._compiler is None:
            return function
        self.compiled.append(self._compiler.compiled(function, name))
        return self.compiled[-1]


def _for_evaluation(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Dropout that the trace found switched on between layers is off, and the like.

    A normalisation without running statistics always takes the batch's own.
    """
    if not isinstance(function, torch._ops.OpOverload):
        return arguments, keywords
    names = [argument.name for argument in function._schema.arguments]
    positional = list(zip(names, arguments, strict=False))
    if "running_mean" in names and (dict(positional) | keywords).get("running_mean") is None:
        return arguments, keywords
    return (
        tuple(_OF_TRAINING.get(name, value) for name, value in positional),
        {name: _OF_TRAINING.get(name, value) for name, value in keywords.items()},
    )
