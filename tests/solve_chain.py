"""Chains of hand-made layers, and a simulation that is the step-time formula itself."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.cluster.types import Cluster, Device, Host, Link
from planner.graph import LayerGraph, LayerNode, ParameterSpec, TensorSpec
from planner.plan.code import Reference, Statement
from planner.profile import LayerProfile, Profile
from planner.solve import Constraints, Placement, Problem, Simulated
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.instance import rank_units, step_ticks
from planner.solve.types import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a chain; seconds and activation bytes are those of one sample."""

    forward_seconds: float = 1e-3
    backward_seconds: float = 2e-3
    num_elements: int = 1000
    saved_bytes: int = 4096
    output_elements: int = 256
    transient_bytes: int = 512
    shares_first: bool = False
    """Uses the first layer's parameter as well (tied weights)."""


def make_graph(layers: Sequence[Layer], micro_batch_size: int) -> LayerGraph:
    nodes, tensors, parameters = [], [], []
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        output = "loss" if last else f"t{index}"
        source = Statement(target="x0", function="batch", arguments=("x",)) if index == 0 else None
        argument = Reference("x0") if index == 0 else Reference(f"t{index - 1}")
        call = Statement(
            target=output, function="layer", path=f"layers.{index}", arguments=(argument,)
        )
        names = (f"weight.{index}",) + (("weight.0",) if layer.shares_first and index else ())
        nodes.append(
            LayerNode(
                name=f"layers.{index}",
                code=(source, call) if source else (call,),
                inputs=() if index == 0 else (f"t{index - 1}",),
                outputs=(output,),
                parameters=names,
                buffer_bytes=0,
                signature=f"layer {index}",
            )
        )
        parameters.append(
            ParameterSpec(
                name=f"weight.{index}", shape=(layer.num_elements,), dtype="float32", trainable=True
            )
        )
        if not last:
            tensors.append(
                TensorSpec(
                    name=output,
                    shape=(micro_batch_size, layer.output_elements),
                    stride=(layer.output_elements, 1),
                    dtype="float32",
                    requires_grad=True,
                )
            )
    batch = TensorSpec(
        name="x", shape=(micro_batch_size, 4), stride=(4, 1), dtype="float32", requires_grad=False
    )
    return LayerGraph(
        model_name="chain",
        fingerprint="chain",
        micro_batch_size=micro_batch_size,
        batch=(batch,),
        loss_keys=(),
        prologue=(),
        layers=tuple(nodes),
        tensors=tuple(tensors),
        parameters=tuple(parameters),
        num_random_operators=0,
    )


def make_profile(layers: Sequence[Layer], micro_batch_size: int) -> Profile:
    return Profile(
        micro_batch_size=micro_batch_size,
        layers=tuple(
            LayerProfile(
                name=f"layers.{index}",
                forward=(),
                backward=(),
                parameter_bytes=4 * layer.num_elements,
                saved_bytes=layer.saved_bytes * micro_batch_size,
                saved_tensors=(f"t{index - 1}",) if index else ("x",),
                forward_transient_bytes=(layer.saved_bytes + layer.transient_bytes)
                * micro_batch_size,
                backward_transient_bytes=layer.transient_bytes * micro_batch_size,
                forward_seconds=layer.forward_seconds * micro_batch_size,
                backward_seconds=layer.backward_seconds * micro_batch_size,
            )
            for index, layer in enumerate(layers)
        ),
    )


def make_cluster(
    num_devices: int,
    *,
    memory_bytes: int = 2**40,
    bandwidth: float = 1e9,
    latency_seconds: float = 1e-6,
    num_hosts: int = 1,
    message_seconds: float = 0.0,
) -> Cluster:
    device = Device(
        name="test device",
        memory_bytes=memory_bytes,
        peak_flops={"float32": 1e12},
        memory_bandwidth=1e11,
        kernel_overhead_seconds=1e-6,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="made for tests",
        message_seconds=message_seconds,
    )
    link = Link(name="inside", bandwidth=bandwidth, latency_seconds=latency_seconds)
    network = Link(name="between", bandwidth=bandwidth / 10, latency_seconds=latency_seconds * 10)
    host = Host(device=device, num_devices=num_devices // num_hosts, link=link)
    return Cluster(
        name="test cluster",
        hosts=(host,) * num_hosts,
        network=network,
        backend="gloo",
        provenance="made for tests",
    )


def make_problem(
    layers: Sequence[Layer],
    *,
    num_devices: int = 1,
    global_batch_size: int = 8,
    cluster: Cluster | None = None,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float = 20.0,
    **constraints: int | bool | None,
) -> Problem:
    return Problem(
        graph_at=lambda size: make_graph(layers, size),
        profile_at=lambda size: make_profile(layers, size),
        cluster=cluster or make_cluster(num_devices),
        num_devices=num_devices,
        global_batch_size=global_batch_size,
        constraints=Constraints(**constraints),  # type: ignore[arg-type]
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
    )


def choice_of(placement: Placement) -> Choice:
    ranks, stage_ranks = placement.num_pipeline_ranks, placement.stage_ranks
    modular = tuple(stage % ranks for stage in range(len(stage_ranks)))
    is_modular = stage_ranks == modular and len(stage_ranks) % ranks == 0
    return Choice(
        num_replicas=placement.num_replicas,
        num_pipeline_ranks=placement.num_pipeline_ranks,
        stages_per_rank=max(Counter(stage_ranks).values()),
        assignment=() if is_modular else stage_ranks,
        micro_batch_size=placement.micro_batch_size,
        num_micro_batches=placement.num_micro_batches,
        partition=placement.partition,
        recompute=_same(placement.recompute),
        offload_state=placement.offload_state,
        offload_inputs=placement.offload_inputs,
        num_buffers=placement.num_weight_buffers,
        layout=placement.layout,
        partition_group_size=placement.partition_group_size,
    )


def _same(recompute: tuple[bool, ...]) -> bool | None:
    """What all stages have in common, if anything."""
    return recompute[0] if len(set(recompute)) == 1 else None


def split_of(placement: Placement) -> Split:
    return Split(boundaries=placement.boundaries, recompute=placement.recompute)


def formula(problem: Problem, *, excess_bytes: int = 0) -> Callable[[Placement], Simulated]:
    """A simulation that returns the solver's own formulas, peaks raised by `excess_bytes`."""
    builder = Builder(problem=problem)

    def simulate(placement: Placement) -> Simulated:
        instance = builder.instance(choice_of(placement))
        units = rank_units(instance, split_of(placement))
        return Simulated(
            step_seconds=step_ticks(instance, split_of(placement)) * instance.tick_seconds,
            peak_bytes=tuple(count * instance.unit_bytes + excess_bytes for count in units),
        )

    return simulate
