"""The traced model: records at any micro-batch size, and keeps what it has made.

It ties the parts of this folder together and knows none of their insides.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.compute_type import cast_tensor, to_compute_type
from planner.errors import ModelFileError, TraceError, UsageError
from planner.graph import LayerGraph
from planner.model_file import ModelFile, build_on_meta, fingerprint, forward_keys
from planner.plan.code import Statement
from planner.precision import Precision
from planner.trace.analyse import analyse
from planner.trace.fake import fake_batch, fake_copy, fake_run
from planner.trace.interpret import Context
from planner.trace.layers import build_layer_graph
from planner.trace.leaves import choose_leaves, descend, expose
from planner.trace.record import record
from planner.trace.scaled import scaled_graph
from planner.trace.statements import write_statements
from planner.trace.unread import free_unread

__all__ = ["TracedModel", "patterns_of", "trace"]

# Batch normalisation refuses one sample of one pixel, so two tell more than one.
_FIRST_BATCH_SIZE = 2
_HALF_HINT = (
    "see whether the model runs as build_model().to(torch.{0}): tensors that its forward makes "
    "must take the type of what they meet; or plan without --precision"
)


class TracedModel:
    """A model on fake tensors, and its LayerGraph at every micro-batch size asked for."""

    def __init__(
        self,
        model_file: ModelFile,
        precision: Precision = Precision.MODEL,
        keep_float32: Sequence[str] = (),
    ) -> None:
        self.model_file = model_file
        self.precision, self.keep_float32 = precision, tuple(keep_float32)
        built = build_on_meta(model_file.build_model, model_file.name)
        self.fingerprint = fingerprint(built)
        built = to_compute_type(built, precision, keep_float32)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = fake_copy(built, self.mode)
        self.leaves = self._first_leaves()
        self._graphs: dict[int, LayerGraph] = {}
        self._guesses: dict[int, LayerGraph] = {}

    def layer_graph(self, micro_batch_size: int) -> LayerGraph:
        """The LayerGraph at this micro-batch size (in samples).

        Raises:
            TraceError: the model cannot be traced into layers.
            ModelFileError: the example batch breaks its contract.
        """
        if micro_batch_size not in self._graphs:
            self._graphs[micro_batch_size] = self._trace(micro_batch_size)
        return self._graphs[micro_batch_size]

    def any_graph(self, micro_batch_size: int) -> LayerGraph:
        """The LayerGraph at this size: traced, or what two sizes that were traced say of it.

        Raises as `layer_graph`.
        """
        if micro_batch_size not in self._guesses:
            traced, guess = [*self._graphs.values()], None
            if micro_batch_size not in self._graphs and len(traced) > 1:
                guess = scaled_graph(traced[0], traced[1], micro_batch_size)
            self._guesses[micro_batch_size] = guess or self.layer_graph(micro_batch_size)
        return self._guesses[micro_batch_size]

    @property
    def first_graph(self) -> LayerGraph:
        """The LayerGraph at the size that is traced first: for what does not depend on it."""
        return self.layer_graph(_FIRST_BATCH_SIZE)

    def context(self, batch: Mapping[str, torch.Tensor]) -> Context:
        """What the LayerGraph's statements refer to, on fake tensors."""
        return Context(
            model=self.model,
            batch=batch,
            loss_fn=self.model_file.loss_fn,
            device=torch.device("cpu"),
        )

    def fake_batch(self, micro_batch_size: int) -> dict[str, torch.Tensor]:
        """The example batch on fake tensors of this traced model's mode."""
        batch = fake_batch(self.model_file, micro_batch_size, self.mode)
        return {key: cast_tensor(value, self.precision) for key, value in batch.items()}

    def _first_leaves(self) -> tuple[str, ...]:
        if not self.model_file.layers:
            return choose_leaves(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for path in self.model_file.layers:
            if path not in modules or not path:
                raise ModelFileError(
                    f"layers of {self.model_file.name} names {path!r}, which is no module of "
                    "the model",
                    hint="use names from model.named_modules()",
                )
        return tuple(dict.fromkeys(self.model_file.layers))

    def _trace(self, micro_batch_size: int) -> LayerGraph:
        batch = self.fake_batch(micro_batch_size)
        with fake_run(self.mode):
            try:
                statements = self._record(batch)
            except TraceError:
                # Once more, for an error that names the line: recording lines takes time.
                statements = self._record(batch, with_lines=True)
            analysis = analyse(statements, self.context(batch))
        statements, analysis = free_unread(statements, analysis)
        return build_layer_graph(
            statements,
            analysis,
            self.model,
            batch,
            model_name=self.model_file.name,
            fingerprint=self.fingerprint,
            micro_batch_size=micro_batch_size,
        )

    def _record(
        self, batch: Mapping[str, torch.Tensor], *, with_lines: bool = False
    ) -> list[Statement]:
        recording = record(self.model, self._call, batch, self.leaves, with_lines=with_lines)
        for inner in () if self.model_file.layers else recording.left_behind:
            finer = expose(self.model, self.leaves, inner)
            if finer != self.leaves:
                self.leaves = finer
                return self._record(batch, with_lines=with_lines)
        has_loss_fn = self.model_file.loss_fn is not None
        return write_statements(recording, self.model, batch, has_loss_fn=has_loss_fn)

    def _call(self, batch: dict[str, torch.Tensor]) -> Any:
        if not self.model_file.layers:
            keys = forward_keys(self.model, batch)
            _check_arguments(self.model, batch)
            return self.model(**{key: batch[key] for key in keys})
        modules = [self.model.get_submodule(path) for path in self.model_file.layers]
        value = _call_first(modules[0], batch)
        for module in modules[1:]:
            value = module(value)
        return value

    def refine(self) -> None:
        """Cut finer, into the children of leaves, while there is but one layer with parameters."""
        while len(self.first_graph.layers) < 2 and not self.model_file.layers:
            finer = descend(self.model, self.leaves)
            if finer == self.leaves:
                return
            coarse, self.leaves = self.leaves, finer
            self._graphs.clear()
            try:
                self.layer_graph(_FIRST_BATCH_SIZE)
            except TraceError:
                self.leaves = coarse
                self._graphs.clear()
                return


def _check_arguments(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """Refuse a batch without an argument that the model's forward cannot do without."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in variable
        if needed and name not in batch:
            raise ModelFileError(
                f"forward of {type(model).__name__} needs {name!r}, which is no key of "
                f"example_batch: it has {', '.join(batch)}",
                hint="name the keys of the batch as forward names its arguments",
            )


def _call_first(module: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    keys = forward_keys(module, batch)
    if keys:
        return module(**{key: batch[key] for key in keys})
    takes = list(inspect.signature(module.forward).parameters)
    if len(batch) >= 1 and takes:
        return module(next(iter(batch.values())))
    raise ModelFileError(
        f"the first of the listed layers takes {takes}, but the batch has {list(batch)}",
        hint="name its argument like a key of the batch",
    )


def patterns_of(
    model_file: ModelFile, precision: Precision, keep_float32: Sequence[str]
) -> tuple[str, ...]:
    """What stays in float32: the model file's patterns and these; nothing but in mixed precision.

    Raises:
        UsageError: patterns are given without mixed precision.
    """
    if precision.is_mixed:
        return (*model_file.keep_float32, *keep_float32)
    if keep_float32:
        raise UsageError(
            f"{keep_float32[0]!r} is to stay in float32, but no other type was asked for",
            hint="--precision bfloat16, or leave --keep-float32 out",
        )
    return ()


def trace(
    model_file: ModelFile,
    precision: Precision = Precision.MODEL,
    keep_float32: Sequence[str] = (),
) -> TracedModel:
    """Trace the model that a model file builds, in train mode, on fake tensors.

    With a mixed `precision` it is the compute copy that is traced: floating parameters, buffers and
    batch keys are of its type, but for what patterns say to keep (`planner.compute_type`).

    Raises:
        UsageError: a pattern matches nothing.
        TraceError: the model cannot be traced into layers; names the module and the line.
        ModelFileError: a function of the model file fails or breaks its contract.
    """
    try:
        traced = TracedModel(model_file, precision, keep_float32)
        traced.refine()
    except TraceError as error:
        if not precision.is_mixed:
            raise
        raise TraceError(error.message, hint=_HALF_HINT.format(precision.value)) from None
    return traced
