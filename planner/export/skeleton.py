"""A plan for a schedule that came without a model: one layer per stage, all costs given.

The layers form a chain of made-up modules, so the plan can be checked, simulated, shown and
exported, but no model file belongs to it. This module does not know how the schedule was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cluster.types import Cluster, Device, Host, Link
from planner.errors import UsageError
from planner.export.torch_import import ImportedSchedule
from planner.graph import LayerGraph, LayerNode, ParameterSpec, TensorSpec
from planner.lower import lower
from planner.plan.code import Reference, Statement
from planner.plan.types import Plan, PlanOptions
from planner.profile import LayerProfile, Profile
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["StageCosts", "chain_model", "ideal_cluster", "skeleton_plan"]

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """What one micro-batch costs, for all stages alike or for each."""

    forward_seconds: Sequence[float] = (1.0,)
    """One number for all stages, or one each; so for the next two."""
    backward_seconds: Sequence[float] = (2.0,)
    """Of a whole backward pass."""
    backward_weight_seconds: Sequence[float] = (1.0,)
    """The part of it that finds the weights' gradients."""
    tensor_bytes: int = 4
    """Of the tensor between two stages, float32: rounded up to whole numbers."""
    num_parameters: int = 1
    """Of each stage, float32."""

    def each(self, name: str, num_stages: int) -> list[float]:
        """The seconds of this name for every stage.

        Raises:
            UsageError: there is neither one number nor one for each stage.
        """
        values: Sequence[float] = getattr(self, name)
        if len(values) not in (1, num_stages):
            raise UsageError(
                f"{len(values)} numbers of {name.replace('_', ' ')} for {num_stages} stages",
                hint="give one number for all stages, or one for each",
            )
        return list(values) * (num_stages // len(values))


def ideal_cluster(num_devices: int) -> Cluster:
    """Devices on which only the given seconds pass: transfers and updates are free."""
    device = Device(
        name="ideal",
        memory_bytes=10**15,
        peak_flops={"float32": 1e30},
        memory_bandwidth=1e30,
        kernel_overhead_seconds=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="made up: nothing takes time but what is given",
    )
    link = Link(name="ideal", bandwidth=1e30, latency_seconds=0.0)
    return Cluster(
        name="ideal",
        hosts=(Host(device=device, num_devices=num_devices, link=link),),
        network=link,
        backend="gloo",
        provenance="made up",
    )


def skeleton_plan(
    schedule: ImportedSchedule, costs: StageCosts, cluster: Cluster, *, name: str = "skeleton"
) -> Plan:
    """The plan of a schedule on the ranks that it names; its prediction is still open.

    Args:
        schedule: which compute each rank does, in order.
        costs: of the stages.
        cluster: at least as many devices as the schedule has ranks.
        name: of the model that is not there.

    Raises:
        UsageError: the costs are not for so many stages, or the weights' part of backward is
            more than the whole.
    """
    num_stages = len(schedule.stage_ranks)
    if schedule.splits_backward:
        _check_halves(costs, num_stages)
    graph, profile = chain_model(num_stages, costs, name=name)
    placement = Placement(
        num_replicas=1,
        num_pipeline_ranks=len(schedule.order.ranks),
        boundaries=tuple(range(num_stages + 1)),
        stage_ranks=schedule.stage_ranks,
        micro_batch_size=1,
        num_micro_batches=schedule.num_micro_batches,
        partition=0,
        recompute=(False,) * num_stages,
        schedule=Schedule.CUSTOM,
    )
    return lower(graph, profile, cluster, placement, PlanOptions(), order=schedule.order)


def _check_halves(costs: StageCosts, num_stages: int) -> None:
    """A part of backward is no longer than the whole."""
    parts = costs.each("backward_weight_seconds", num_stages)
    wholes = costs.each("backward_seconds", num_stages)
    for stage, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
        if part > whole:
            raise UsageError(
                f"stage {stage}: the weights' part of backward takes {part:g} s, the whole "
                f"{whole:g} s",
                hint="give the whole of backward, and the part of it that finds weight gradients",
            )


def chain_model(
    num_stages: int, costs: StageCosts, *, name: str = "chain"
) -> tuple[LayerGraph, Profile]:
    """A model of one layer per stage, and what it costs.

    Raises:
        UsageError: the costs are not for so many stages.
    """
    graph = _chain(num_stages, costs, name)
    seconds = zip(
        costs.each("forward_seconds", num_stages),
        costs.each("backward_seconds", num_stages),
        costs.each("backward_weight_seconds", num_stages),
        strict=True,
    )
    layers = zip(graph.layers, seconds, strict=True)
    profile = Profile(
        micro_batch_size=1,
        layers=tuple(_layer_profile(layer, costs, *each) for layer, each in layers),
    )
    return graph, profile


def _chain(num_stages: int, costs: StageCosts, name: str) -> LayerGraph:
    """Layer s reads h_<s-1> and makes h_<s>; the last makes the loss."""
    width = -(-costs.tensor_bytes // _FLOAT_BYTES)
    made = [f"h_{stage}" for stage in range(num_stages - 1)]
    return LayerGraph(
        model_name=name,
        fingerprint="skeleton",
        micro_batch_size=1,
        batch=(
            TensorSpec(
                name="x", shape=(1, width), stride=(width, 1), dtype="float32", requires_grad=False
            ),
        ),
        loss_keys=(),
        prologue=(Statement(target="x", function="batch", arguments=("x",)),),
        layers=tuple(
            _layer(stage, "x" if stage == 0 else made[stage - 1], [*made, "loss"][stage])
            for stage in range(num_stages)
        ),
        tensors=tuple(
            TensorSpec(
                name=tensor,
                shape=(1, width),
                stride=(width, 1),
                dtype="float32",
                requires_grad=True,
            )
            for tensor in made
        ),
        parameters=tuple(
            ParameterSpec(
                name=f"stage.{stage}.weight",
                shape=(costs.num_parameters,),
                dtype="float32",
                trainable=True,
            )
            for stage in range(num_stages)
        ),
        num_random_operators=0,
    )


def _layer(stage: int, source: str, target: str) -> LayerNode:
    name = f"stage.{stage}"
    return LayerNode(
        name=name,
        code=(
            Statement(
                target=target,
                function="layer",
                path=name,
                arguments=(Reference(source),),
            ),
        ),
        inputs=() if source == "x" else (source,),
        outputs=(target,),
        parameters=(f"{name}.weight",),
        buffer_bytes=0,
        signature="stage",
    )


def _layer_profile(
    layer: LayerNode,
    costs: StageCosts,
    forward_seconds: float,
    backward_seconds: float,
    weight_seconds: float,
) -> LayerProfile:
    return LayerProfile(
        name=layer.name,
        forward=(),
        backward=(),
        parameter_bytes=costs.num_parameters * _FLOAT_BYTES,
        saved_bytes=0,
        saved_tensors=layer.inputs or ("x",),
        forward_transient_bytes=0,
        backward_transient_bytes=0,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        backward_weight_seconds=min(weight_seconds, backward_seconds),
        provenance="given",
    )
