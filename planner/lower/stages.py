"""Stages of the plan: code, boundary tensors, and predicted cost of one micro-batch."""

import math
from collections.abc import Iterable

from planner.cluster.types import Cluster
from planner.cost import layer_seconds
from planner.graph import LayerGraph, StageCode
from planner.lower.routes import Route
from planner.lower.stage_memory import stage_memory
from planner.plan.types import StagePlan, Unit
from planner.profile import Profile
from planner.solve.types import Placement

__all__ = ["StageMaker", "count_messages"]


class StageMaker:
    """Makes the StagePlans of a placement."""

    def __init__(
        self,
        graph: LayerGraph,
        profile: Profile,
        cluster: Cluster,
        placement: Placement,
        routes: Iterable[Route],
    ) -> None:
        self._graph, self._profile, self._cluster = graph, profile, cluster
        self._placement = placement
        self._specs = graph.tensor_specs
        self._parameters = graph.parameter_specs
        self._trainable = {p.name for p in graph.parameters if p.trainable}
        self._messages = count_messages(routes, placement.num_stages)

    def stage(self, index: int, code: StageCode, units: Iterable[Unit]) -> StagePlan:
        """The StagePlan of one stage, its code and its units.

        Its seconds include the compute time that its transfers take from the device, if any.
        """
        placement = self._placement
        first, last = placement.boundaries[index], placement.boundaries[index + 1]
        layers = self._profile.layers[first:last]
        rank, recompute = placement.stage_ranks[index], placement.recompute[index]
        forward, again, backward, backward_weight = self._seconds(index)
        nodes = self._graph.layers[first:last]
        names = {name for layer in layers for name in layer.saved_tensors}
        names -= set(code.mutated_inputs)  # backward reads the stage's own copies of them
        memory = stage_memory(
            nodes, layers, code, self._specs, self._parameters, recompute=recompute
        )
        return StagePlan(
            index=index,
            rank=rank,
            layers=tuple(node.name for node in nodes),
            recompute=recompute,
            code=code.code,
            inputs=code.inputs,
            outputs=code.outputs,
            batch_keys=code.batch_keys,
            units=tuple(unit.name for unit in units),
            mutated_inputs=code.mutated_inputs,
            kept=tuple(
                name
                for name in (*code.inputs, *code.outputs, *code.batch_keys)
                if name in names and name != "loss"
            ),
            forward_seconds=forward,
            backward_seconds=backward,
            recompute_seconds=again if recompute else None,
            backward_weight_seconds=backward_weight,
            saved_bytes=memory.saved_bytes,
            forward_transient_bytes=(
                memory.unsaved_transient_bytes if recompute else memory.saving_transient_bytes
            ),
            recompute_transient_bytes=memory.saving_transient_bytes if recompute else 0,
            backward_transient_bytes=memory.backward_transient_bytes,
        )

    def _seconds(self, index: int) -> tuple[float, float, float, float]:
        """Forward, recompute, backward, and of that the part that makes gradients of parameters.

        A recompute takes what was measured, else as long as the forward, without messages. The
        part of backward is the profile's where it has one, else modelled: half of backward where a
        parameter is trained, as the two products of a linear layer's backward are equal. Replicas
        wait for each other in the end, so a layer takes what it takes on the slowest of them.
        """
        placement = self._placement
        layers = range(placement.boundaries[index], placement.boundaries[index + 1])
        replicas = map(
            self._cluster.device, placement.grid.replicas_of(placement.stage_ranks[index])
        )
        devices = list({id(device): device for device in replicas}.values())
        message_seconds = max(device.message_seconds for device in devices)
        messages = [message_seconds * count for count in self._messages[index]]
        seconds = [
            max((layer_seconds(self._profile.layers[layer], device) for device in devices), key=sum)
            for layer in layers
        ]
        again, backward_weight = [], []
        for layer, (forward, backward) in zip(layers, seconds, strict=True):
            measured = self._profile.layers[layer].recompute_seconds
            again.append(forward if measured is None else measured)
            known = self._profile.layers[layer].backward_weight_seconds
            trains = not self._trainable.isdisjoint(self._graph.layers[layer].parameters)
            modelled = backward / 2 if trains else 0.0
            backward_weight.append(modelled if known is None else min(known, backward))
        return (
            math.fsum(forward for forward, _ in seconds) + messages[0],
            math.fsum(again),
            math.fsum(backward for _, backward in seconds) + messages[1],
            math.fsum(backward_weight),
        )


def count_messages(routes: Iterable[Route], num_stages: int) -> list[list[int]]:
    """Per stage, the messages it sends and receives in forward and backward of a micro-batch."""
    counts = [[0, 0] for _ in range(num_stages)]
    for route in routes:
        for direction, hops in enumerate((route.forward_hops(), route.backward_hops())):
            for source, destination in hops:
                counts[route.chain[source]][direction] += 1
                counts[route.chain[destination]][direction] += 1
    return counts
