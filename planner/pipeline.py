"""The whole way from a model file to a proved plan: trace, measure, solve, lower, check, simulate.

This module knows the order of the levels and the defaults. It does not know what any level does.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from planner.apply_profile import AppliedProfile, apply_profile
from planner.check import Report, check
from planner.cluster import Cluster
from planner.errors import CheckError, UsageError
from planner.graph import LayerGraph
from planner.lower import lower
from planner.measure import measure
from planner.measure.measured import MeasuredModel
from planner.measure.optimizer import optimizer_slots
from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions, Prediction
from planner.simulate import Simulation, simulate
from planner.solve import Constraints, Placement, Problem, Simulated, Solution, solve
from planner.trace import trace

__all__ = ["DEFAULT_SAMPLES_PER_DEVICE", "PlanResult", "default_batch_size", "make_plan"]

DEFAULT_SAMPLES_PER_DEVICE = 8
"""Global batch per device where the user names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A plan, and what was learnt on the way to it."""

    plan: Plan
    graph: LayerGraph
    solution: Solution
    simulation: Simulation
    report: Report
    trace_seconds: float
    measured: AppliedProfile | None = None
    """Where the seconds of layers were measured."""


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
    measured: MeasuredModel | None = None,
    memory_limit_bytes: int | None = None,
    clip_norm: float | None = None,
    check_finite: bool = False,
    save: bool = False,
    time_limit_seconds: float = 20.0,
    seed: int = 0,
) -> PlanResult:
    """Plan a model for the first `num_devices` devices of a cluster.

    `global_batch_size` is in samples per step over all replicas. With `measured`
    (`planner.measure.file`) layers take what was measured. `memory_limit_bytes` is per device
    (the device's memory less what is reserved, where absent), `time_limit_seconds` for the solver.
    With `clip_norm` (largest norm of the whole model's gradient) or `check_finite` (skip the update
    of a step with a gradient that is not finite) all updates stand at the end of the step. With
    `save` every step leaves a complete checkpoint in host memory (`Executor.checkpoint`).

    Raises:
        UsageError: the demands contradict each other, the model or the cluster, or the profile
            was measured of another model or device.
        ModelFileError, TraceError: the model cannot be built or traced into layers.
        InfeasibleError: no plan fits in memory.
        CheckError: the plan made breaks a rule: a defect of this program.
    """
    constraints, started = constraints or Constraints(), time.monotonic()
    traced = trace(model_file)
    options = replace(
        _optimizer_options(model_file, cluster),
        seed=seed,
        clip_norm=_checked_norm(clip_norm),
        check_finite=check_finite,
        save=save,
    )
    counted_at = cache(partial(measure, traced))
    applied = None
    if measured is not None:
        applied = apply_profile(
            measured, traced.layer_graph, counted_at, cluster, options.optimizer_slots
        )
    problem = Problem(
        graph_at=traced.layer_graph,
        profile_at=counted_at if applied is None else cache(applied.profile_at),
        cluster=cluster if applied is None else applied.cluster,
        num_devices=num_devices,
        global_batch_size=global_batch_size or default_batch_size(num_devices, constraints),
        constraints=constraints,
        optimizer_slots=options.optimizer_slots,
        updates_wait=check_finite or clip_norm is not None,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        seed=seed,
    )
    return _solved(problem, options, time.monotonic() - started, applied)


def _solved(
    problem: Problem, options: PlanOptions, trace_seconds: float, measured: AppliedProfile | None
) -> PlanResult:
    """Solve, and prove the winner's plan."""
    planned = _planner(problem, options)

    def simulated(placement: Placement) -> Simulated:
        _, simulation = planned(placement)
        return Simulated(step_seconds=simulation.step_seconds, peak_bytes=simulation.peak_bytes)

    solution = solve(problem, simulated)
    plan, simulation = planned(solution.placement)
    plan = replace(plan, prediction=_prediction(problem, plan, simulation, measured))
    return PlanResult(
        plan=plan,
        graph=problem.graph_at(plan.micro_batch_size),
        solution=solution,
        simulation=simulation,
        report=_proved(plan),
        trace_seconds=trace_seconds,
        measured=measured,
    )


def _optimizer_options(model_file: ModelFile, cluster: Cluster) -> PlanOptions:
    slots = optimizer_slots(model_file, is_cuda=cluster.backend == "nccl")
    return PlanOptions(
        optimizer_slots=slots.kept,
        update_slots_of_each=slots.of_each,
        update_slots_of_previous=slots.of_previous,
        update_slots_of_all=slots.of_all,
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


def _prediction(
    problem: Problem, plan: Plan, simulation: Simulation, measured: AppliedProfile | None
) -> Prediction:
    cluster, limit = problem.cluster, problem.memory_limit_bytes
    devices = [cluster.device(rank) for rank in range(plan.world_size)]
    least = min(device.memory_bytes - device.reserved_bytes for device in devices)
    layers = "from the roofline"
    if measured is not None:
        layers = measured.note_at(plan.micro_batch_size)
    return Prediction(
        step_seconds=simulation.step_seconds,
        bubble=simulation.bubble,
        peak_bytes=simulation.peak_bytes,
        memory_limit_bytes=least if limit is None else limit,
        provenance=f"simulated on {cluster.name} ({cluster.provenance}); layers {layers}",
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
