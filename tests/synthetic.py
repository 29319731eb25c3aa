"""Hand-made LayerGraphs, Profiles, Clusters and Plans with round costs: chains of equal layers."""

from collections.abc import Sequence
from typing import Any

from planner.cluster.types import Cluster, Device, Host, Link
from planner.graph import LayerGraph, LayerNode, ParameterSpec, TensorSpec
from planner.layouts import Layout
from planner.lower import lower
from planner.plan.code import Reference, Statement
from planner.plan.types import Plan, PlanOptions
from planner.profile import LayerProfile, Profile
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["chain_cluster", "chain_graph", "chain_placement", "chain_plan", "chain_profile"]


def chain_graph(
    num_layers: int,
    *,
    width: int = 1,
    num_elements: int = 1,
    micro_batch_size: int = 1,
    tied: Sequence[tuple[int, int]] = (),
    skips: Sequence[tuple[int, int]] = (),
    num_random_operators: int = 0,
    compute_dtype: str = "",
) -> LayerGraph:
    """Layer i reads h_<i-1> and makes h_<i>, tensors of `width` floats per sample.

    `tied` lists (layer, layer) pairs that share one more parameter; `skips` lists (maker, reader)
    pairs of layers with one more tensor between them.
    """

    def tensor(name: str) -> TensorSpec:
        return TensorSpec(
            name=name,
            shape=(micro_batch_size, width),
            stride=(width, 1),
            dtype="float32",
            requires_grad=True,
        )

    def parameter(name: str, aliases: tuple[str, ...] = ()) -> ParameterSpec:
        return ParameterSpec(
            name=name,
            aliases=aliases,
            shape=(num_elements,),
            dtype="float32",
            trainable=True,
            compute_dtype=compute_dtype,
        )

    layers = []
    for index in range(num_layers):
        last = index == num_layers - 1
        inputs = [f"h_{index - 1}"] if index else []
        inputs += [f"skip_{maker}_{reader}" for maker, reader in skips if reader == index]
        outputs = ["loss" if last else f"h_{index}"]
        outputs += [f"skip_{maker}_{reader}" for maker, reader in skips if maker == index]
        names = [f"layer.{index}.weight"]
        names += [f"tied.{i}" for i, pair in enumerate(tied) if index in pair]
        arguments = [Reference(name) for name in inputs] or [Reference("x")]
        body = Statement(
            target=f"t_{index}",
            function="layer",
            path=f"layer.{index}",
            arguments=tuple(arguments),
            first_random_operator=index * num_random_operators,
            num_random_operators=num_random_operators,
        )
        handed = Statement(
            target=outputs[0],
            function="loss" if last else "aten.clone.default",
            arguments=(Reference(f"t_{index}"),),
        )
        extra = [
            Statement(target=n, function="aten.clone.default", arguments=(Reference(f"t_{index}"),))
            for n in outputs[1:]
        ]
        layers.append(
            LayerNode(
                name=f"layer.{index}",
                code=(body, handed, *extra),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                parameters=tuple(names),
                buffer_bytes=0,
                signature="last" if last else "layer",
            )
        )
    batch = TensorSpec(
        name="x", shape=(micro_batch_size, 1), stride=(1, 1), dtype="float32", requires_grad=False
    )
    made = [name for layer in layers for name in layer.outputs if name != "loss"]
    return LayerGraph(
        model_name="chain",
        fingerprint=f"chain-{num_layers}-{width}",
        micro_batch_size=micro_batch_size,
        batch=(batch,),
        loss_keys=(),
        prologue=(Statement(target="x", function="batch", arguments=("x",)),),
        layers=tuple(layers),
        tensors=tuple(tensor(name) for name in made),
        parameters=tuple(
            parameter(name)
            for name in dict.fromkeys(name for layer in layers for name in layer.parameters)
        ),
        num_random_operators=num_layers * num_random_operators,
    )


def chain_profile(
    graph: LayerGraph,
    *,
    forward_seconds: float | Sequence[float] = 1.0,
    backward_seconds: float | Sequence[float] = 2.0,
    saved_bytes: int = 0,
    transient_bytes: int = 0,
) -> Profile:
    """Measured seconds for every layer, one number for all or one each."""

    def each(value: float | Sequence[float]) -> list[float]:
        return [value] * len(graph.layers) if isinstance(value, int | float) else list(value)

    sizes = {parameter.name: parameter.num_bytes for parameter in graph.parameters}
    return Profile(
        micro_batch_size=graph.micro_batch_size,
        layers=tuple(
            LayerProfile(
                name=layer.name,
                forward=(),
                backward=(),
                parameter_bytes=sum(sizes[name] for name in layer.parameters),
                saved_bytes=saved_bytes,
                saved_tensors=layer.inputs,
                forward_transient_bytes=transient_bytes,
                backward_transient_bytes=transient_bytes,
                forward_seconds=forward,
                backward_seconds=backward,
            )
            for layer, forward, backward in zip(
                graph.layers, each(forward_seconds), each(backward_seconds), strict=True
            )
        ),
    )


def chain_cluster(
    num_devices: int,
    *,
    bandwidth: float = 1e30,
    latency_seconds: float = 0.0,
    devices_per_host: int | None = None,
    network_bandwidth: float | None = None,
    network_latency_seconds: float | None = None,
    memory_bytes: int = 10**15,
) -> Cluster:
    """One host, or hosts of `devices_per_host`; links and devices free unless told otherwise."""
    device = Device(
        name="ideal",
        memory_bytes=memory_bytes,
        peak_flops={"float32": 1e30},
        memory_bandwidth=1e30,
        kernel_overhead_seconds=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="made up",
    )
    link = Link(name="link", bandwidth=bandwidth, latency_seconds=latency_seconds)
    network = Link(
        name="network",
        bandwidth=bandwidth if network_bandwidth is None else network_bandwidth,
        latency_seconds=(
            latency_seconds if network_latency_seconds is None else network_latency_seconds
        ),
    )
    per_host = devices_per_host or num_devices
    return Cluster(
        name="made-up",
        hosts=tuple(
            Host(device=device, num_devices=per_host, link=link)
            for _ in range(-(-num_devices // per_host))
        ),
        network=network,
        backend="gloo",
        provenance="made for a test",
    )


def chain_placement(
    num_stages: int,
    num_pipeline_ranks: int,
    num_micro_batches: int,
    *,
    layers_per_stage: int = 1,
    num_replicas: int = 1,
    partition: int = 0,
    recompute: bool = False,
    num_weight_buffers: int = 2,
    num_gradient_buffers: int = 2,
    schedule: Schedule = Schedule.LAYERED,
    group_size: int = 0,
    offload_state: bool = False,
    offload_inputs: bool = False,
    layout: Layout = Layout.REPLICAS_INSIDE,
    partition_group_size: int = 0,
    stage_ranks: tuple[int, ...] | None = None,
) -> Placement:
    """Equal stages, s on rank s mod P unless `stage_ranks` says where."""
    return Placement(
        num_replicas=num_replicas,
        num_pipeline_ranks=num_pipeline_ranks,
        boundaries=tuple(range(0, num_stages * layers_per_stage + 1, layers_per_stage)),
        stage_ranks=stage_ranks or tuple(s % num_pipeline_ranks for s in range(num_stages)),
        micro_batch_size=1,
        num_micro_batches=num_micro_batches,
        partition=partition,
        recompute=(recompute,) * num_stages,
        num_weight_buffers=num_weight_buffers,
        num_gradient_buffers=num_gradient_buffers,
        schedule=schedule,
        group_size=group_size,
        offload_state=offload_state,
        offload_inputs=offload_inputs,
        layout=layout,
        partition_group_size=partition_group_size,
    )


def chain_plan(
    num_stages: int = 4,
    num_pipeline_ranks: int = 2,
    num_micro_batches: int = 2,
    *,
    width: int = 1,
    num_elements: int = 1,
    tied: Sequence[tuple[int, int]] = (),
    skips: Sequence[tuple[int, int]] = (),
    num_random_operators: int = 0,
    compute_dtype: str = "",
    options: PlanOptions | None = None,
    cluster: Cluster | None = None,
    forward_seconds: float | Sequence[float] = 1.0,
    backward_seconds: float | Sequence[float] = 2.0,
    saved_bytes: int = 0,
    transient_bytes: int = 0,
    **placement: Any,
) -> Plan:
    """The lowered plan of a chain; `placement` goes to `chain_placement`."""
    graph = chain_graph(
        num_stages * placement.get("layers_per_stage", 1),
        width=width,
        num_elements=num_elements,
        tied=tied,
        skips=skips,
        num_random_operators=num_random_operators,
        compute_dtype=compute_dtype,
    )
    profile = chain_profile(
        graph,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        saved_bytes=saved_bytes,
        transient_bytes=transient_bytes,
    )
    placed = chain_placement(num_stages, num_pipeline_ranks, num_micro_batches, **placement)
    cluster = cluster or chain_cluster(placed.world_size)
    return lower(graph, profile, cluster, placed, options or PlanOptions())
