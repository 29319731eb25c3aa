"""From a model file to the question that the solver answers: trace, count, apply what was measured.

This module knows the defaults of what the user leaves open. It does not know how plans are found.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

from planner.apply_profile import AppliedProfile, apply_profile
from planner.cluster import Cluster
from planner.errors import TraceError, UsageError
from planner.graph import LayerGraph
from planner.host_memory import within_host_memory
from planner.lower import lower
from planner.measure import measure
from planner.measure.measured import MeasuredModel
from planner.measure.optimizer import optimizer_slots
from planner.model_file import ModelFile
from planner.partitions import gathers_updates
from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision, with_masters
from planner.profile import Profile
from planner.schedule import Order
from planner.schedules import OrderSearch, Schedule
from planner.simulate import Simulation, simulate
from planner.solve import Constraints, Placement, Problem
from planner.trace import TracedModel, patterns_of, same_graph, trace

__all__ = ["DEFAULT_SAMPLES_PER_DEVICE", "Prepared", "default_batch_size", "prepare"]

DEFAULT_SAMPLES_PER_DEVICE = 8
"""Global batch per device where the user names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model that is traced, and all that was asked: from here plans cost no trace any more."""

    problem: Problem
    graph: LayerGraph
    """For what does not depend on the micro-batch size: the parameters, the shape of a sample."""
    options: PlanOptions
    trace_seconds: float
    measured: AppliedProfile | None = None
    """Where the seconds of layers were measured."""
    order: OrderSearch | None = None
    """Which orders of compute are searched beside those of the families."""
    traced: "Prepared | None" = None
    """The same question with every size traced, where here most sizes follow from two."""

    def with_batch(self, global_batch_size: int) -> "Prepared":
        """The same question for another number of samples per step."""
        return replace(
            self,
            problem=replace(self.problem, global_batch_size=global_batch_size),
            traced=self.traced and self.traced.with_batch(global_batch_size),
        )

    def with_order(self, order: OrderSearch | None) -> "Prepared":
        """The same question with other orders of compute to choose from.

        Raises:
            UsageError: updates are on the host, for which no other order is planned.
        """
        if order is not None and self.options.update_on_host:
            raise UsageError(
                f"updates on the host go with the layered schedule alone, not with a search for "
                f"the order ({order.value})",
                hint="leave one of them out",
            )
        return replace(self, order=order, traced=self.traced and self.traced.with_order(order))

    def foresees(self, micro_batch_size: int) -> bool:
        """Whether the graph that a size was given is the one that it is traced into."""
        if self.traced is None:
            return True
        try:
            graph = self.traced.problem.graph_at(micro_batch_size)
        except TraceError:
            return False
        return same_graph(graph, self.problem.graph_at(micro_batch_size))

    def planner_for(self, problem: Problem) -> Callable[[Placement], tuple[Plan, Simulation]]:
        """`lowered` for a changed problem. Plans of large models are large, so a few are kept: what
        is asked for again is asked for soon."""
        return lru_cache(maxsize=8)(replace(self, problem=problem).lowered)

    def lowered(self, placement: Placement, order: Order | None = None) -> tuple[Plan, Simulation]:
        """The plan of a placement, its prediction still open, and what the simulator says.

        Without an order of its own it follows its schedule's.
        """
        size, problem = placement.micro_batch_size, self.problem
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        plan = lower(graph, profile, problem.cluster, placement, self.options, order)
        return plan, simulate(plan)


def default_batch_size(num_devices: int, constraints: Constraints) -> int:
    """Samples per step where the user names none: what the other choices imply, else 8 a device."""
    implied = (
        constraints.num_replicas, constraints.micro_batch_size, constraints.num_micro_batches
    )  # fmt: skip
    if None not in implied:
        return (implied[0] or 0) * (implied[1] or 0) * (implied[2] or 0)
    return DEFAULT_SAMPLES_PER_DEVICE * num_devices


def prepare(
    model_file: ModelFile,
    *,
    num_devices: int,
    cluster: Cluster,
    global_batch_size: int | None = None,
    constraints: Constraints | None = None,
    measured: MeasuredModel | None = None,
    memory_limit_bytes: int | None = None,
    clip_norm: float | None = None,
    clip_delayed: bool = False,
    check_finite: bool = False,
    save: bool = False,
    update_on_host: bool = False,
    precision: Precision = Precision.MODEL,
    keep_float32: Sequence[str] = (),
    time_limit_seconds: float = 20.0,
    seed: int = 0,
) -> Prepared:
    """Trace a model, and put the question of its plan.

    `global_batch_size` is in samples per step over all replicas. With `measured`
    (`planner.measure.file`) layers take what was measured. `memory_limit_bytes` is per device
    (the device's memory less what is reserved, where absent), `time_limit_seconds` for the solver.
    With `clip_norm` (largest norm of the whole model's gradient) or `check_finite` (skip the update
    of a step with a gradient that is not finite) all updates stand at the end of the step, unless
    `clip_delayed` scales by the norm of the step before. With `save` every step leaves a complete
    checkpoint in host memory (`Executor.checkpoint`). With `update_on_host` the optimizer steps on
    the host, on a state that stays there: it asks for offload of the state, with partition 0 or 3.
    A mixed `precision` computes in its type and
    keeps float32 masters, but for modules of parameters that patterns say to keep, here or in the
    model file; float16 scales the loss, so it implies `check_finite`.

    Raises:
        UsageError: the profile was measured of another model or device, or in another precision, a
            figure is impossible, or demands contradict each other.
        ModelFileError, TraceError: the model cannot be built or traced into layers.
    """
    constraints, started = constraints or Constraints(), time.monotonic()
    if update_on_host:
        constraints = _with_updates_on_host(constraints)
    patterns = patterns_of(model_file, precision, keep_float32)
    if measured is not None:
        _check_precision(measured, precision, patterns)
    step = _checked(
        PlanOptions(
            seed=seed,
            clip_norm=clip_norm,
            clip_delayed=clip_delayed,
            check_finite=check_finite or precision is Precision.FLOAT16,
            save=save,
            update_on_host=update_on_host,
            precision=precision,
            keep_float32=patterns,
        )
    )
    traced = trace(model_file, precision, patterns)
    graph = with_masters(traced.first_graph, precision)
    options = _with_optimizer(step, model_file, cluster)
    slots = options.optimizer_slots
    if global_batch_size is None:
        global_batch_size = default_batch_size(num_devices, constraints)
    problem = Problem(
        graph_at=traced.layer_graph,
        profile_at=partial(measure, traced),
        cluster=cluster,
        num_devices=num_devices,
        global_batch_size=global_batch_size,
        constraints=within_host_memory(constraints, cluster, graph, slots),
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        seed=seed,
    )
    question = Prepared(
        problem=_with_step(problem, options),
        graph=graph,
        options=options,
        trace_seconds=time.monotonic() - started,
    )
    return _with_traces(question, traced, measured)


def _with_traces(
    question: Prepared, traced: TracedModel, measured: MeasuredModel | None
) -> Prepared:
    """The question with graphs of any size, and the same with traced ones alone."""
    return replace(
        _with_graphs(question, traced, traced.any_graph, measured),
        traced=_with_graphs(question, traced, traced.layer_graph, measured),
    )


def _with_step(problem: Problem, options: PlanOptions) -> Problem:
    """The problem with what the step's options mean for time and memory."""
    clips = options.clip_norm is not None and not options.clip_delayed
    return replace(
        problem,
        optimizer_slots=options.optimizer_slots,
        update_slots_of_each=options.update_slots_of_each,
        update_slots_of_previous=options.update_slots_of_previous,
        update_slots_of_all=options.update_slots_of_all,
        updates_wait=options.updates_wait,
        num_verdicts=options.check_finite + clips,
    )


def _with_graphs(
    question: Prepared,
    traced: TracedModel,
    graph_at: Callable[[int], LayerGraph],
    measured: MeasuredModel | None,
) -> Prepared:
    """The question with these graphs, and profiles of them."""

    @cache
    def profile_at(size: int) -> Profile:
        return measure(traced, size, graph=graph_at(size))

    @cache
    def kept_graph_at(size: int) -> LayerGraph:
        return with_masters(graph_at(size), traced.precision)

    problem = replace(question.problem, graph_at=kept_graph_at, profile_at=profile_at)
    if measured is None:
        return replace(question, problem=problem)
    # The layers of a graph that follows from two others are not named as what was measured is.
    slots, precision = problem.optimizer_slots, traced.precision
    applied = apply_profile(
        measured,
        lambda size: with_masters(traced.layer_graph(size), precision),
        profile_at,
        problem.cluster,
        slots,
    )
    problem = replace(problem, profile_at=cache(applied.profile_at), cluster=applied.cluster)
    return replace(question, problem=problem, measured=applied)


def _check_precision(
    measured: MeasuredModel, precision: Precision, patterns: tuple[str, ...]
) -> None:
    """Refuse seconds of layers that computed in other types."""
    if (measured.precision, measured.keep_float32) == (precision, patterns):
        return

    def words(of: Precision, kept: tuple[str, ...]) -> str:
        own = "its own types" if of is Precision.MODEL else of.value
        return f"{own}, {', '.join(kept)} in float32" if kept else own

    found, wanted = words(measured.precision, measured.keep_float32), words(precision, patterns)
    raise UsageError(
        f"the profile was measured of the model in {found}, but the plan is to be in {wanted}",
        hint="measure with the same --precision and --keep-float32: lga-profile MODEL",
    )


def _with_optimizer(options: PlanOptions, model_file: ModelFile, cluster: Cluster) -> PlanOptions:
    slots = optimizer_slots(model_file, is_cuda=cluster.backend == "nccl")
    return replace(
        options,
        optimizer_slots=slots.kept,
        update_slots_of_each=slots.of_each,
        update_slots_of_previous=slots.of_previous,
        update_slots_of_all=slots.of_all,
    )


def _with_updates_on_host(wanted: Constraints) -> Constraints:
    """The demands, with that of a state that lives where it is updated.

    Raises:
        UsageError: the state is demanded elsewhere.
    """
    for contradicts, what, hint in (
        (wanted.offload_state is False, "no offload of the state", "leave out --no-offload-state"),
        (
            gathers_updates(wanted.partition or 0),
            f"partition {wanted.partition}, whose weights stay on the device",
            "--partition 0 or 3",
        ),
        (
            wanted.schedule not in (None, Schedule.LAYERED),
            f"the schedule {wanted.schedule}, for which offload is not planned",
            "the layered schedule",
        ),
    ):
        if contradicts:
            raise UsageError(
                f"updates on the host need shards and optimizer state there, but {what} is "
                "demanded as well",
                hint=f"{hint}, or --update-on device",
            )
    return replace(wanted, offload_state=True, update_on_host=True)


def _checked(options: PlanOptions) -> PlanOptions:
    """The options of a step, if they go together."""
    clip_norm = options.clip_norm
    if clip_norm is not None and not (0 < clip_norm < math.inf):
        raise UsageError(
            f"clip_norm is {clip_norm}, not a finite number above 0",
            hint="give the largest norm of the whole model's gradient, such as 1.0",
        )
    if options.clip_delayed and clip_norm is None:
        raise UsageError("clip_delayed without clip_norm", hint="give the norm with --clip-norm")
    if options.clip_delayed and options.check_finite:
        raise UsageError(
            "clip_delayed and check_finite, which float16 implies: updates that wait for the check "
            "gain nothing by a norm of the step before",
            hint="leave out one of the two",
        )
    return options
