"""X_160, a trillion parameters, on A100s at their peak: layers, devices, and simulated plans.

A member of the family in arXiv:2106.02679: x layers of width x^2, sequences of 16 x tokens, 12 x^5
parameters, a critical batch of 82 x^(2/3) sequences. Knows what `trillion.py` makes its table of.
"""

from dataclasses import dataclass, replace

from planner.cluster.types import Cluster, Device, Host, Link
from planner.cost import layer_seconds, tensor_seconds
from planner.cost.tensor import split_layer
from planner.export.skeleton import StageCosts, chain_model
from planner.graph import LayerGraph
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import LayerProfile, LayerSplit, OperatorClass, OperatorCount, Profile
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve.types import Placement

SIZE = 160
NUM_LAYERS, WIDTH, SEQUENCE = SIZE, SIZE**2, 16 * SIZE
NUM_HEADS = SIZE
PARAMETERS_PER_LAYER = 12 * WIDTH**2
BATCH = int(82 * SIZE ** (2 / 3))
DTYPE, ELEMENT_BYTES = "float16", 2
STATE_SLOTS = 5
"""Half-precision tensors beside the weights' shard: with it 12 bytes per parameter, a single-
precision master copy and two moments."""
NVLINK = Link(name="NVLink 600 GB/s", bandwidth=300e9, latency_seconds=0.0)
INFINIBAND = Link(name="InfiniBand 200 Gb/s", bandwidth=25e9, latency_seconds=0.0)
ETHERNET = Link(name="Ethernet 25 Gb/s", bandwidth=3.125e9, latency_seconds=0.0)
"""Each direction; the names give both directions together, or the wire's rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One strategy, and what the reference says of it."""

    name: str
    num_replicas: int = 1
    num_pipeline_ranks: int = 1
    tensor_degree: int = 1
    num_micro_batches: int
    partition: int = 3
    schedule: Schedule = Schedule.LAYERED
    network: Link = INFINIBAND
    reference_days: float
    """Our calculation from the stated rules of arXiv:2106.02679."""

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.num_pipeline_ranks * self.tensor_degree


def analytic_layer() -> LayerProfile:
    """One transformer block and one sequence, whole, with what tensor parallelism divides of it.

    Products of qkv, output, up and down projections. Saved bytes: Korthikanti et al., "Reducing
    activation recomputation in large transformer models", 2022, equation 2. Above them, backward
    holds the gradients of the block's output and input, and of both sides of the activation.
    All-reduces: one after attention, one after the MLP, in each direction.
    """
    tokens = SEQUENCE * WIDTH
    projections = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    scores = 5 * NUM_HEADS * SEQUENCE // WIDTH
    whole, split = 10, 24 + scores
    all_reduced = (tokens * ELEMENT_BYTES,) * 2
    parameter_bytes = PARAMETERS_PER_LAYER * ELEMENT_BYTES
    return LayerProfile(
        name="block",
        forward=tuple(_product(*sides, num_kernels=1) for sides in projections),
        backward=tuple(_product(*sides, num_kernels=2) for sides in projections),
        parameter_bytes=parameter_bytes,
        saved_bytes=tokens * (whole + split),
        saved_tensors=(),
        forward_transient_bytes=0,
        backward_transient_bytes=tokens * (4 + 16),
        forward_all_reduce_bytes=all_reduced,
        backward_all_reduce_bytes=all_reduced,
        split=LayerSplit(
            parameters=("weight",),
            parameter_bytes=parameter_bytes,
            tensors=(),
            saved_share=split / (whole + split),
            forward_peaks=(),
            backward_peaks=((4 / 20, 16 / 20),),
            pieces=NUM_HEADS,
        ),
        provenance="computed by hand",
    )


def device() -> Device:
    """An A100 that reaches its peaks and issues kernels in no time."""
    return Device(
        name="A100 at its peak",
        memory_bytes=80 * 10**9,
        peak_flops={DTYPE: 312e12},
        memory_bandwidth=2.039e12,
        kernel_overhead_seconds=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        reserved_bytes=0,
        provenance="NVIDIA A100 datasheet, June 2021",
        host_bandwidth=31.5e9,
    )


def _product(rows: int, columns: int, *, num_kernels: int) -> OperatorCount:
    """Half-precision product of a sequence with a matrix; backward has two of the same flop."""
    moved = SEQUENCE * (rows + columns) + rows * columns
    return OperatorCount(
        flop=2 * SEQUENCE * rows * columns,
        moved_bytes=ELEMENT_BYTES * moved,
        dtype=DTYPE,
        num_kernels=num_kernels,
        kind=OperatorClass.PRODUCT,
        split=True,
    )


def seconds_of_layer(tensor_degree: int) -> tuple[float, float, float]:
    """Forward, backward, and the all-reduces of one layer and micro-batch, on one of the GPUs."""
    layer = analytic_layer()
    forward, backward = layer_seconds(split_layer(layer, tensor_degree), device())
    return forward, backward, sum(tensor_seconds(layer, tensor_degree, NVLINK))


def simulate_row(
    row: Row,
    cluster: Cluster,
    reduce_seconds: float,
    *,
    ahead: bool = True,
    num_gradient_buffers: int = 2,
) -> Simulation:
    """Lower and simulate a row: one stage per layer, stage inputs kept, the rest recomputed.

    Of the seconds of all-reduces, half stand in backward, a quarter in forward and a quarter in
    recompute: the reference counts four. Without `ahead`, recompute is a part of backward, which
    begins when its gradient has come: the reference's rule.
    """
    forward, backward, _ = seconds_of_layer(row.tensor_degree)
    forward, backward = forward + reduce_seconds / 4, backward + reduce_seconds / 2
    graph, profile = _model(row.tensor_degree, forward, backward if ahead else forward + backward)
    placement = Placement(
        num_replicas=row.num_replicas,
        num_pipeline_ranks=row.num_pipeline_ranks,
        boundaries=tuple(range(NUM_LAYERS + 1)),
        stage_ranks=tuple(stage % row.num_pipeline_ranks for stage in range(NUM_LAYERS)),
        micro_batch_size=1,
        num_micro_batches=row.num_micro_batches,
        partition=row.partition,
        recompute=(ahead,) * NUM_LAYERS,
        schedule=row.schedule,
        num_gradient_buffers=num_gradient_buffers,
    )
    return simulate(
        lower(graph, profile, cluster, placement, PlanOptions(optimizer_slots=STATE_SLOTS))
    )


def _model(
    tensor_degree: int, forward_seconds: float, backward_seconds: float
) -> tuple[LayerGraph, Profile]:
    """X_160 on one of so many GPUs, which also share what passes between stages."""
    elements = SEQUENCE * WIDTH // tensor_degree
    costs = StageCosts(
        tensor_bytes=4 * elements, num_parameters=PARAMETERS_PER_LAYER // tensor_degree
    )
    graph, chain = chain_model(NUM_LAYERS, costs, name=f"X_{SIZE}")
    graph = replace(
        graph,
        tensors=tuple(replace(tensor, dtype=DTYPE) for tensor in graph.tensors),
        parameters=tuple(replace(parameter, dtype=DTYPE) for parameter in graph.parameters),
        batch=tuple(replace(tensor, dtype=DTYPE) for tensor in graph.batch),
    )
    block = split_layer(analytic_layer(), tensor_degree)
    layers = (
        replace(
            block,
            name=layer.name,
            saved_tensors=layer.saved_tensors,
            forward_seconds=forward_seconds,
            backward_seconds=backward_seconds,
        )
        for layer in chain.layers
    )
    return graph, replace(chain, layers=tuple(layers))


def cluster_of(row: Row, network: Link | None, gpu: Device | None = None) -> Cluster:
    """One GPU of each tensor-parallel group, with an adapter of its own.

    Without a network transfers are free, without a device updates and copies are.
    """
    link = network or Link(name="free", bandwidth=1e30, latency_seconds=0.0)
    num_devices = row.num_replicas * row.num_pipeline_ranks
    free = replace(device(), memory_bandwidth=1e30, host_bandwidth=None)
    host = Host(device=gpu or free, num_devices=num_devices, link=link)
    return Cluster(
        name="A100 at the peak",
        hosts=(host,),
        network=link,
        backend="nccl",
        provenance="made up for this table",
    )
