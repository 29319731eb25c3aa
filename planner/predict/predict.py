"""Predict one configuration: split, place, lower and simulate, as plans are.

Everything goes through the machinery of plans: the instructions that are simulated are those that a
plan would have, with T devices of a host in the place of one. So at degree 1 a prediction is the
simulation of a plan. The runtime does not execute other degrees yet.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from planner.cluster.types import Cluster
from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.lower import lower
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.precision import Precision, with_masters
from planner.predict.tensor import split_cluster, split_graph, timed_profile
from planner.predict.types import ONE_STAGE, Breakdown, Configuration, Predicted
from planner.profile import Profile
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve import Constraints, Placement, Problem
from planner.solve.build import Builder
from planner.solve.choices import Choice, check_problem
from planner.solve.entry import placement_of
from planner.solve.splits import warm_start

__all__ = ["predict"]

_NO_LIMIT = 2**60


def predict(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    configuration: Configuration,
    *,
    optimizer_slots: int = 2,
    precision: Precision = Precision.MODEL,
    memory_limit_bytes: int | None = None,
) -> Predicted:
    """One step of a configuration on the first devices of a cluster.

    `graph` and `profile` are those of the configuration's micro-batch size; for a tensor degree
    above 1 the profile must say what is split (`planner.measure.with_splits`). Both were traced
    in `precision`: what training in it keeps and reduces of every parameter is that of its master.
    What does not fit in memory is predicted all the same: see `Predicted.missing_bytes`.

    Raises:
        UsageError: the configuration contradicts itself, the model or the cluster.
    """
    _check(configuration, graph, cluster)
    degree = configuration.tensor_degree
    timed, reduces = timed_profile(graph, profile, cluster, degree)
    seen = split_cluster(cluster, degree)
    part = with_masters(split_graph(graph, profile, degree), precision)
    problem = _problem(part, timed, seen, configuration, optimizer_slots, memory_limit_bytes)
    placement = _place(problem, configuration)
    plan = lower(part, timed, seen, placement, PlanOptions(optimizer_slots=optimizer_slots))
    simulation = simulate(plan)
    limits = [d.usable_bytes for d in map(seen.device, range(plan.world_size))]
    return Predicted(
        configuration=configuration,
        boundaries=placement.boundaries,
        step_seconds=simulation.step_seconds,
        breakdown=_breakdown(plan, simulation, placement, reduces),
        memory=simulation.memory,
        memory_limit_bytes=min(limits) if memory_limit_bytes is None else memory_limit_bytes,
    )


def _check(configuration: Configuration, graph: LayerGraph, cluster: Cluster) -> None:
    for name in (
        "num_replicas", "num_pipeline_ranks", "tensor_degree", "stages_per_rank",
        "micro_batch_size", "num_micro_batches",
    ):  # fmt: skip
        if getattr(configuration, name) < 1:
            raise UsageError(
                f"{name.replace('_', ' ')} is {getattr(configuration, name)}",
                hint="give a number of at least 1",
            )
    if configuration.micro_batch_size != graph.micro_batch_size:
        raise UsageError(
            f"the configuration's micro-batches have {configuration.micro_batch_size} samples, the "
            f"graph's {graph.micro_batch_size}",
            hint="trace and measure at the configuration's micro-batch size",
        )
    if configuration.num_devices > cluster.num_devices:
        raise UsageError(
            f"{configuration.num_replicas} replicas x {configuration.num_pipeline_ranks} pipeline "
            f"ranks x tensor degree {configuration.tensor_degree} need "
            f"{configuration.num_devices} devices, but cluster {cluster.name} has "
            f"{cluster.num_devices}",
            hint="smaller factors, or a larger cluster",
        )
    if configuration.schedule in ONE_STAGE and configuration.stages_per_rank > 1:
        raise UsageError(
            f"{configuration.stages_per_rank} stages per rank, but the schedule "
            f"{configuration.schedule.value} has one",
            hint="use layered or interleaved, or 1 stage per rank",
        )


def _problem(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    configuration: Configuration,
    optimizer_slots: int,
    memory_limit_bytes: int | None,
) -> Problem:
    # The memory model is that of the layered order; others hold less, and simulating tells.
    is_layered = configuration.schedule is Schedule.LAYERED
    problem = Problem(
        graph_at=lambda _: graph,
        profile_at=lambda _: profile,
        cluster=cluster,
        num_devices=configuration.num_replicas * configuration.num_pipeline_ranks,
        global_batch_size=configuration.global_batch_size,
        constraints=Constraints(
            num_replicas=configuration.num_replicas,
            num_pipeline_ranks=configuration.num_pipeline_ranks,
            stages_per_rank=configuration.stages_per_rank,
            micro_batch_size=configuration.micro_batch_size,
            num_micro_batches=configuration.num_micro_batches,
            partition=configuration.partition,
            recompute=configuration.recompute,
        ),
        optimizer_slots=optimizer_slots,
        memory_limit_bytes=memory_limit_bytes if is_layered else _NO_LIMIT,
    )
    check_problem(problem, len(graph.layers))
    return problem


def _place(problem: Problem, configuration: Configuration) -> Placement:
    """The solver's split of the configuration, or the one given."""
    choice = Choice(
        num_replicas=configuration.num_replicas,
        num_pipeline_ranks=configuration.num_pipeline_ranks,
        stages_per_rank=configuration.stages_per_rank,
        micro_batch_size=configuration.micro_batch_size,
        num_micro_batches=configuration.num_micro_batches,
        # One replica has nothing to partition.
        partition=configuration.partition if configuration.num_replicas > 1 else 0,
        recompute=configuration.recompute,
    )
    boundaries = configuration.boundaries
    if boundaries is None:
        boundaries = warm_start(Builder(problem=problem).instance(choice)).boundaries
    num_layers = len(problem.graph_at(configuration.micro_batch_size).layers)
    rising = all(first < end for first, end in itertools.pairwise(boundaries))
    if (
        len(boundaries) != choice.num_stages + 1
        or not rising
        or ((boundaries[0], boundaries[-1]) != (0, num_layers))
    ):
        raise UsageError(
            f"boundaries {boundaries} do not split {num_layers} layers into {choice.num_stages} "
            "stages",
            hint=f"give {choice.num_stages + 1} rising numbers from 0 to {num_layers}",
        )
    return replace(
        placement_of(choice, choice.split(boundaries)),
        schedule=configuration.schedule,
        group_size=configuration.group_size,
    )


def _breakdown(
    plan: Plan,
    simulation: Simulation,
    placement: Placement,
    reduces: Sequence[tuple[float, float]],
) -> Breakdown:
    ranks = plan.num_pipeline_ranks
    updates = [0.0] * ranks
    for event in simulation.timeline.events:
        if plan.programs[event.rank][event.index].opcode is Opcode.UPDATE:
            updates[event.rank] += event.end_seconds - event.start_seconds
    tensor = [0.0] * ranks
    for stage, rank in enumerate(placement.stage_ranks):
        layers = reduces[placement.boundaries[stage] : placement.boundaries[stage + 1]]
        forward, backward = (math.fsum(seconds) for seconds in zip(*layers, strict=True))
        passes = 2 if placement.recompute[stage] else 1
        tensor[rank] += placement.num_micro_batches * (passes * forward + backward)
    step, busy = simulation.step_seconds, math.fsum(simulation.busy_seconds) / ranks
    exposed = math.fsum(simulation.exposed_seconds) / ranks
    update, waiting = math.fsum(updates) / ranks, math.fsum(tensor) / ranks
    return Breakdown(
        compute_seconds=busy - update - waiting,
        tensor_seconds=waiting,
        update_seconds=update,
        exposed_seconds=exposed,
        idle_seconds=max(0.0, step - busy - exposed),
    )
