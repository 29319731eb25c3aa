"""The whole way from a model file to a proved plan: trace, measure, solve, lower, check, simulate.

This module knows the order of the levels and the defaults. It does not know what any level does.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from planner.check import Report, check
from planner.cluster import Cluster
from planner.errors import CheckError, ModelFileError, UsageError
from planner.graph import LayerGraph
from planner.lower import lower
from planner.measure import measure
from planner.model_file import ModelFile, raised_at
from planner.plan.types import Plan, PlanOptions, Prediction
from planner.simulate import Simulation, simulate
from planner.solve import Constraints, Placement, Problem, Simulated, Solution, solve
from planner.trace import trace

__all__ = ["DEFAULT_SAMPLES_PER_DEVICE", "PlanResult", "default_batch_size", "make_plan"]

DEFAULT_SAMPLES_PER_DEVICE = 8
"""Global batch per device where the user names none."""
_ADAMW_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A plan, and what was learnt on the way to it."""

    plan: Plan
    graph: LayerGraph
    solution: Solution
    simulation: Simulation
    report: Report
    trace_seconds: float


def default_batch_size(num_devices: int, constraints: Constraints) -> int:
    """Samples per step where the user names none: what the other choices imply, else 8 a device."""
    implied = (
        constraints.num_replicas, constraints.micro_batch_size, constraints.num_micro_batches
    )  # fmt: skip
    if None not in implied:
        return (implied[0] or 0) * (implied[1] or 0) * (implied[2] or 0)
    return DEFAULT_SAMPLES_PER_DEVICE * num_devices


def make_plan(
    model_file: ModelFile,
    *,
    num_devices: int,
    cluster: Cluster,
    global_batch_size: int | None = None,
    constraints: Constraints | None = None,
    memory_limit_bytes: int | None = None,
    clip_norm: float | None = None,
    check_finite: bool = False,
    save: bool = False,
    time_limit_seconds: float = 20.0,
    seed: int = 0,
) -> PlanResult:
    """Plan a model for the first `num_devices` devices of a cluster.

    `global_batch_size` is in samples per step over all replicas, `memory_limit_bytes` per device
    (the device's memory less what is reserved, where absent), `time_limit_seconds` for the solver.
    With `clip_norm` (largest norm of the whole model's gradient) or `check_finite` (skip the update
    of a step with a gradient that is not finite) all updates stand at the end of the step. With
    `save` every step leaves a complete checkpoint in host memory (`Executor.checkpoint`).

    Raises:
        UsageError: the demands contradict each other, the model or the cluster.
        ModelFileError, TraceError: the model cannot be built or traced into layers.
        InfeasibleError: no plan fits in memory.
        CheckError: the plan made breaks a rule: a defect of this program.
    """
    constraints = constraints or Constraints()
    started = time.monotonic()
    traced = trace(model_file)
    options = PlanOptions(
        seed=seed,
        optimizer_slots=_count_optimizer_slots(model_file),
        clip_norm=_checked_norm(clip_norm),
        check_finite=check_finite,
        save=save,
    )
    problem = Problem(
        graph_at=traced.layer_graph,
        profile_at=cache(partial(measure, traced)),
        cluster=cluster,
        num_devices=num_devices,
        global_batch_size=global_batch_size or default_batch_size(num_devices, constraints),
        constraints=constraints,
        optimizer_slots=options.optimizer_slots,
        updates_wait=check_finite or clip_norm is not None,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        seed=seed,
    )
    trace_seconds = time.monotonic() - started
    return _solved(problem, options, trace_seconds)


def _solved(problem: Problem, options: PlanOptions, trace_seconds: float) -> PlanResult:
    """Solve, and prove the winner's plan."""
    planned = _planner(problem, options)

    def simulated(placement: Placement) -> Simulated:
        _, simulation = planned(placement)
        return Simulated(step_seconds=simulation.step_seconds, peak_bytes=simulation.peak_bytes)

    solution = solve(problem, simulated)
    plan, simulation = planned(solution.placement)
    plan = replace(plan, prediction=_prediction(problem, plan, simulation))
    return PlanResult(
        plan=plan,
        graph=problem.graph_at(plan.micro_batch_size),
        solution=solution,
        simulation=simulation,
        report=_proved(plan),
        trace_seconds=trace_seconds,
    )


def _checked_norm(clip_norm: float | None) -> float | None:
    if clip_norm is not None and not (0 < clip_norm < math.inf):
        raise UsageError(
            f"clip_norm is {clip_norm}, not a finite number above 0",
            hint="give the largest norm of the whole model's gradient, such as 1.0",
        )
    return clip_norm


def _planner(
    problem: Problem, options: PlanOptions
) -> Callable[[Placement], tuple[Plan, Simulation]]:
    """Lower and simulate a placement, each placement once."""

    @cache
    def planned(placement: Placement) -> tuple[Plan, Simulation]:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        plan = lower(graph, profile, problem.cluster, placement, options)
        return plan, simulate(plan)

    return planned


def _prediction(problem: Problem, plan: Plan, simulation: Simulation) -> Prediction:
    cluster, limit = problem.cluster, problem.memory_limit_bytes
    devices = [cluster.device(rank) for rank in range(plan.world_size)]
    least = min(device.memory_bytes - device.reserved_bytes for device in devices)
    layers = problem.profile_at(plan.micro_batch_size).layers
    num_measured = sum(layer.forward_seconds is not None for layer in layers)
    return Prediction(
        step_seconds=simulation.step_seconds,
        bubble=simulation.bubble,
        peak_bytes=simulation.peak_bytes,
        memory_limit_bytes=least if limit is None else limit,
        provenance=f"simulated on {cluster.name} ({cluster.provenance}); {num_measured} of "
        f"{len(layers)} layers measured, the others from the roofline",
    )


def _proved(plan: Plan) -> Report:
    report = check(plan)
    for failure in report.failures:
        raise CheckError(
            f"the plan made breaks rule {failure.number} ({failure.title}):\n"
            f"{failure.counterexample}",
            hint="this is a defect of lga-plan: please report it with the model",
        )
    return report


def _count_optimizer_slots(model_file: ModelFile) -> int:
    """Tensors per parameter that the user's optimizer keeps, counted on a parameter of 2 x 2."""
    if model_file.build_optimizer is None:
        return _ADAMW_SLOTS
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    try:
        optimizer = model_file.build_optimizer([parameter])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it returned {type(optimizer).__name__}, not an Optimizer")
        optimizer.step()
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"build_optimizer of {model_file.name} failed on one parameter of 2 x 2: "
            f"{type(error).__name__}: {error}{raised_at(error)}",
            hint="it takes a list of parameters and returns a torch.optim.Optimizer, whose step() "
            "needs no closure",
        ) from None
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.numel() == 4 for value in state)
