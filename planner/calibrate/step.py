"""Seconds of one training step of a GPT model: what a calibration fits, and what it then predicts.

Knows where layers, head and gradients are, and the closed form of 1F1B. Seconds of kernels and
collectives are `planner.cost`'s. Does not know measured times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.calibrate.gpt import ELEMENT_BYTES, GptShape, gpt_head, gpt_layer, num_gpt_parameters
from planner.calibrate.rows import MeasuredStep
from planner.cluster.types import CollectiveAlgorithm, Device, Link
from planner.cost import (
    all_reduce_seconds,
    kernels_seconds,
    layer_seconds,
    read_seconds,
    transfer_seconds,
    update_seconds,
)
from planner.profile import OperatorCount

__all__ = ["Machine", "one_forward_one_backward_seconds", "step_seconds"]

_CAST_BYTES = 12
"""Per parameter: the half-precision gradient to float32, and the new weight back, read and
written."""
_ADAM_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hosts of equal devices, and what Megatron costs on them beside its kernels."""

    device: Device
    num_host_devices: int
    link: Link
    """Between devices of one host."""
    network: Link
    """Between hosts: its bandwidth is one device's share where all of the host use it."""
    collectives: CollectiveAlgorithm
    skew_seconds: float
    """Host time that each further member adds to an all-reduce: members do not start together."""
    misaligned_efficiency: float
    """Part of their rate that products reach whose rows are no multiple of 16 bytes."""
    ends_seconds: float
    """Per micro-batch, half on the first stage and half on the last: batch, embedding, loss."""
    step_seconds: float
    """Once per step: clipping, the loss scale, the learning rate."""

    def between(self, rank: int, other: int) -> Link:
        """The link of two ranks; ranks fill hosts in order."""
        inside = rank // self.num_host_devices == other // self.num_host_devices
        return self.link if inside else self.network


def step_seconds(step: MeasuredStep, machine: Machine) -> float:
    """Predicted seconds of one step: 1F1B over all stages, then gradients and the update.

    Full recompute; ranks count tensor first, then data, then pipeline, as Megatron does; gradients
    are all-reduced once, after the last micro-batch, and nothing hides them.
    """
    stages = [_stage_seconds(step, stage, machine) for stage in range(step.pipeline)]
    ends = [_end_seconds(step, stage, machine) for stage in range(step.pipeline)]
    tied = 0.0
    if step.pipeline > 1:  # the first and the last stage hold the word embedding both
        link = machine.between(0, step.gpus - 1)
        tied_bytes = step.hidden * step.shape.rank_vocabulary * ELEMENT_BYTES
        tied = all_reduce_seconds(tied_bytes, 2, link, machine.collectives)
    pipeline = one_forward_one_backward_seconds(stages, step.num_micro_batches)
    return pipeline + max(ends) + tied + machine.step_seconds


def one_forward_one_backward_seconds(stages: Sequence[float], num_micro_batches: int) -> float:
    """1F1B from the seconds of one micro-batch's forward and backward on each stage.

    The slowest stage works without a pause once it has begun; before its first and after its last
    micro-batch the other stages do one each (Narayanan et al., "Memory-efficient pipeline-parallel
    DNN training", ICML 2021, with equal stages).
    """
    return sum(stages) + (num_micro_batches - 1) * max(stages)


def _stage_seconds(step: MeasuredStep, stage: int, machine: Machine) -> float:
    """Forward, recompute and backward of one micro-batch on one stage, and its messages."""
    shape = step.shape
    seconds = _num_layers(step, stage) * _layer_seconds(shape, machine)
    if stage == 0:
        seconds += machine.ends_seconds / 2
    if stage == step.pipeline - 1:
        head = gpt_head(shape, machine.misaligned_efficiency)
        seconds += sum(layer_seconds(head, machine.device)) + machine.ends_seconds / 2
    messages = [
        2 * transfer_seconds(shape.hidden_bytes, _boundary_link(step, other, machine))
        for other in (stage, stage + 1)
        if 0 < other < step.pipeline
    ]
    return seconds + max(messages, default=0.0)


def _layer_seconds(shape: GptShape, machine: Machine) -> float:
    layer = gpt_layer(shape)

    def seconds(counts: tuple[OperatorCount, ...], sizes: tuple[int, ...]) -> float:
        collectives = (
            all_reduce_seconds(size, shape.tensor, machine.link, machine.collectives)
            for size in sizes
        )
        return kernels_seconds(
            counts,
            machine.device,
            collective_seconds=sum(collectives),
            waiting_seconds=machine.skew_seconds * (shape.tensor - 1) * len(sizes),
        )

    forward = (layer.forward, layer.forward_all_reduce_bytes)
    # Recompute and backward follow each other without a wait between them.
    backward = (
        layer.forward + layer.backward,
        layer.forward_all_reduce_bytes + layer.backward_all_reduce_bytes,
    )
    return seconds(*forward) + seconds(*backward)


def _end_seconds(step: MeasuredStep, stage: int, machine: Machine) -> float:
    """All-reduce of a stage's gradients and its update."""
    embeddings = (stage == 0) + (stage == step.pipeline - 1 and step.pipeline > 1)
    number = num_gpt_parameters(step.shape, _num_layers(step, stage), embeddings=embeddings)
    device = machine.device
    update = update_seconds(number, device, _ADAM_SLOTS) + read_seconds(
        _CAST_BYTES * number, device
    )
    # A host's members of one group share its adapters with the groups of its other devices.
    inside = min(step.data, max(1, machine.num_host_devices // step.tensor))
    link = machine.link
    if inside < step.data:
        link = Link(
            name=machine.network.name,
            bandwidth=min(machine.link.bandwidth, machine.network.bandwidth * inside),
            latency_seconds=machine.network.latency_seconds,
        )
    return update + all_reduce_seconds(number * ELEMENT_BYTES, step.data, link, machine.collectives)


def _boundary_link(step: MeasuredStep, stage: int, machine: Machine) -> Link:
    """Between the first ranks of a stage and of the one before."""
    stage_ranks = step.tensor * step.data
    return machine.between((stage - 1) * stage_ranks, stage * stage_ranks)


def _num_layers(step: MeasuredStep, stage: int) -> int:
    return step.layers // step.pipeline + (stage < step.layers % step.pipeline)
