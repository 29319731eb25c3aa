"""Compares one planned step with plain accumulation in one process: loss and every gradient.

With one replica every figure must be bitwise equal, except parameters shared by stages of two
pipeline ranks: their two parts are added in another order. With more replicas the collective adds
in another order. There the relative root-mean-square difference must be within the tolerance.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.compute_type import cast_tensor, to_compute_type
from planner.model_file import ModelFile
from planner.plan.types import Plan, Unit
from runtime.build import build_model
from runtime.data import Batches
from runtime.executor import Executor
from runtime.loss_scale import LossScale
from runtime.reference import accumulate, accumulate_mixed, loss_of_model
from runtime.result import StepResult
from runtime.shards import UnitState

__all__ = ["Difference", "Recorder", "compare", "tolerance_of", "worst"]

RELATIVE_RMS = {
    "float64": 1e-14,
    "float32": 1e-6,
    "bfloat16": 1e-2,
    "float16": 2e-3,
    "complex64": 1e-6,
    "complex128": 1e-14,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one planned tensor is from the plain one."""

    name: str
    """Parameter, `buffer <name>`, or `loss of micro-batch m`."""
    largest: float
    """Largest absolute difference; infinite where either is not finite."""
    relative_rms: float
    """Root-mean-square difference over the root-mean-square of the plain one."""
    tolerance: float
    """0: bitwise."""
    num_elements: int

    @property
    def passed(self) -> bool:
        if self.tolerance == 0:
            return self.largest == 0
        return self.relative_rms <= self.tolerance


class Recorder:
    """Keeps this rank's reduced gradients of one step."""

    def __init__(self) -> None:
        self.parts: list[tuple[UnitState, Tensor]] = []

    def __call__(self, state: UnitState, gradient: Tensor) -> None:
        self.parts.append((state, gradient.clone()))


def tolerance_of(plan: Plan, unit: Unit, *, is_compiled: bool = False) -> float:
    """0 where the order of additions is that of plain accumulation."""
    if is_compiled:
        return _compiled_tolerance(plan, unit.dtype)
    if plan.num_replicas == 1 and len(unit.ranks) == 1:
        return 0.0
    # Between ranks a micro-batch's parts of a tied gradient are added in float32, plainly in half.
    return RELATIVE_RMS[unit.dtype if len(unit.ranks) == 1 else unit.weights_dtype]


def _compiled_tolerance(plan: Plan, dtype: str) -> float:
    """Compiled kernels add, and round, in ways of their own; integers stay exact."""
    compute_dtype = plan.options.precision.compute_dtype
    if dtype in RELATIVE_RMS and compute_dtype is not None:
        dtype = compute_dtype
    return 10 * RELATIVE_RMS.get(dtype, 0.0)


def compare(
    plan: Plan,
    model_file: ModelFile,
    batches: Batches,
    executor: Executor,
    step: int,
) -> tuple[StepResult, list[Difference]]:
    """Run one planned step and the same step plainly; this rank's differences.

    Call it with a fresh executor (its parameters still those of the seed), on every rank.
    """
    model = build_model(model_file, plan.options.seed, executor.device)
    to_compute_type(model, plan.options.precision, plan.options.keep_float32)
    while True:
        recorder, scale = Recorder(), executor.loss_scale
        executor.observe(recorder)
        batch = batches.batch(step, executor.replica) if executor.loads_batch else {}
        result = executor.step(batch)
        executor.observe(None)
        losses = _run_reference(plan, model_file, model, batches, step, executor.device, scale)
        if result.finite is not False or scale is None or scale.scale < 1:
            break
        step += 1  # float16 has found that its scale is too large, updated nothing, and halved it
    is_compiled = executor.compile_report is not None

    def of_values(tensor: Tensor) -> float:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return _compiled_tolerance(plan, dtype) if is_compiled else 0.0

    first = executor.replica * plan.num_micro_batches
    found = [
        _difference(f"loss of micro-batch {m}", mine, losses[first + m], of_values(mine))
        for m, mine in enumerate(result.losses)
    ]
    for state, gradient in recorder.parts:
        tolerance = tolerance_of(plan, state.unit, is_compiled=is_compiled)
        found += _compare_unit(state, gradient, model, tolerance)
    found += _compare_untrained(plan, model)
    if plan.num_replicas == 1:  # each replica keeps running statistics of its own
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, buffer in executor.buffers().items():
            found.append(_difference(f"buffer {name}", buffer, buffers[name], of_values(buffer)))
    return result, found


def _difference(name: str, mine: Tensor, plain: Tensor, tolerance: float) -> Difference:
    """How far `mine` is from `plain`; zero only where torch.equal holds."""
    if torch.equal(mine, plain):
        return Difference(
            name=name, largest=0.0, relative_rms=0.0, tolerance=tolerance, num_elements=mine.numel()
        )
    gap = _double(mine) - _double(plain)
    largest = float(gap.abs().max()) if bool(gap.isfinite().all()) else float("inf")
    scale = _rms(plain)
    rms = _rms(gap)
    return Difference(
        name=name,
        largest=largest,
        relative_rms=rms / scale if scale and largest < float("inf") else float("inf"),
        tolerance=tolerance,
        num_elements=mine.numel(),
    )


def _double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double()


def _rms(tensor: Tensor) -> float:
    return float(_double(tensor).square().mean().sqrt())


def worst(found: list[Difference]) -> Difference:
    """The failed difference that is largest, else the largest."""
    return max(found, key=lambda item: (not item.passed, item.largest))


def _run_reference(
    plan: Plan,
    model_file: ModelFile,
    model: torch.nn.Module,
    batches: Batches,
    step: int,
    device: torch.device,
    loss_scale: LossScale | None,
) -> list[Tensor]:
    """Losses of replica 0's micro-batches, then replica 1's, ...; gradients stay in the model."""
    size, precision = plan.micro_batch_size, plan.options.precision
    micro_batches: list[tuple[int, int, Mapping[str, Tensor]]] = []
    for replica in range(plan.num_replicas):
        batch = batches.batch(step, replica)
        for m in range(plan.num_micro_batches):
            rows = {
                key: cast_tensor(value[m * size : (m + 1) * size], precision).to(device)
                for key, value in batch.items()
            }
            micro_batches.append((replica, m, rows))
    loss_of, seed = loss_of_model(model, model_file), plan.options.seed
    if not precision.is_mixed:
        return accumulate(
            model, loss_of, micro_batches, seed=seed, step=step, weight_of=model_file.loss_weight
        )
    scale = 1.0 if loss_scale is None else loss_scale.scale
    return accumulate_mixed(
        model,
        loss_of,
        micro_batches,
        seed=seed,
        step=step,
        loss_scale=scale,
        weight_of=model_file.loss_weight,
    )


def _compare_unit(
    state: UnitState, gradient: Tensor, model: torch.nn.Module, tolerance: float
) -> list[Difference]:
    """Differences of the parts of parameters that this rank holds."""
    found = []
    for piece in state.pieces:
        plain = model.get_parameter(piece.name).grad
        first = state.ranges[piece.name][0]
        mine = gradient[piece.first - state.first : piece.last - state.first]
        flat = torch.zeros_like(mine)
        if plain is not None:
            whole = state.in_flat_order(piece.name, plain)
            flat = whole[piece.first - first : piece.last - first]
        found.append(_difference(piece.name, mine, flat, tolerance))
    return found


def _compare_untrained(plan: Plan, model: torch.nn.Module) -> list[Difference]:
    """Parameters that plain training finds a gradient for, and the plan trains nowhere."""
    units = [unit for unit in plan.units if unit.trainable]
    trained = {name for unit in units for name in unit.parameters}
    trained &= {spec.name for spec in plan.parameters if spec.trainable}
    return [
        _difference(name, torch.zeros_like(parameter.grad), parameter.grad, 0.0)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name not in trained
    ]
