"""Branch and bound over meshes and batchings, the lowest bound first.

Every mesh and batching waits with a bound that holds for all of its placements. The one whose
bound is lowest is bounded better, or, where that has been done, tried: a few promising choices get
splits. The search ends where no bound is below the best placement simulated, or with the clock; the
lowest bound left is the certificate.
This module knows nodes and their order. It does not know how a choice is split.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from planner.cluster.types import Link
from planner.cost import num_rounds
from planner.solve.bounds import least_rank_units, least_step_ticks
from planner.solve.build import Builder
from planner.solve.choices import Choice, stage_counts
from planner.solve.floor import least_seconds, quick_seconds, rough_seconds
from planner.solve.floor_memory import Surroundings
from planner.solve.floor_stages import staged_seconds
from planner.solve.problem import Problem
from planner.solve.rates import Rates
from planner.solve.sizes import Sizes, in_order
from planner.solve.sketch import sketch
from planner.solve.space import Batching, Options, all_options, choice_of, layouts
from planner.solve.trial import Trial

__all__ = ["Branches", "Node"]

WORTH = 1 - 1e-4
"""A bound above this part of the best known is not worth a try."""
MAX_LEADERS = 4
MAX_COMPARED = 24
"""Nodes among which the leaders of meshes are looked for."""


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """A mesh and batching."""

    batching: Batching
    bound_seconds: float
    """No placement of it is faster."""
    is_bounded: bool = False
    """By what the layers are known to take at least at its micro-batch size."""
    is_exact: bool = False
    """The size has been profiled."""
    options: list[tuple[float, Options]] | None = None
    """With a bound of each, lowest first, once it is near the top; without those that cannot
    fit."""


@dataclass(kw_only=True)
class Branches:
    """The nodes that wait, by bound, and how one is tried."""

    problem: Problem
    num_layers: int
    sizes: Sizes
    builder: Builder
    rates: Rates
    refused: list[Batching] = field(default_factory=list)
    """Of a micro-batch size that the model cannot be traced with."""
    tried: list[Node] = field(default_factory=list)
    _nodes: list[Node] = field(default_factory=list)
    """All of them: an interrupt loses none."""
    _heap: list[tuple[float, int, Node]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _known: dict[tuple[int, int, int], Surroundings] = field(default_factory=dict)
    """By mesh and size of partition groups."""

    def start(self, space: Sequence[Batching]) -> None:
        """Bound all of them by compute alone, from two sizes that can be traced."""
        accepted = (
            size
            for size in self._worth_tracing({batching.micro_batch_size for batching in space})
            if self.sizes.accepts(size)
        )
        for size in itertools.islice(accepted, 2):
            self.rates.learn(size)
        if not self.rates.known:
            self.refused += space
            return
        known = {size: self.rates.at(size) for size in {one.micro_batch_size for one in space}}
        for batching in space:
            bound = rough_seconds(batching, known[batching.micro_batch_size])
            self._nodes.append(Node(batching=batching, bound_seconds=bound))
            self._push(self._nodes[-1])

    def _worth_tracing(self, sizes: Iterable[int]) -> list[int]:
        """The smallest, then those nearest to a device's share of the batch: with it, a step has
        one micro-batch on each device, which often wins; a size between the two follows from
        them, and is traced only if it wins."""
        ordered = in_order(sizes)
        share = self.problem.global_batch_size / self.problem.num_devices
        return ordered[:1] + sorted(
            ordered[1:], key=lambda size: (size == 1, abs(math.log(size / share)), size)
        )

    @property
    def bound_seconds(self) -> float:
        """No placement of any node is faster, tried or not; infinite without nodes."""
        return min((node.bound_seconds for node in self._nodes), default=math.inf)

    @property
    def num_waiting(self) -> int:
        return len(self._heap)

    def next(self, best_seconds: float) -> Node | None:
        """The node with the lowest bound, all bounds up to date; None if none is worth a try."""
        while self._heap and self._heap[0][0] < best_seconds * WORTH:
            _, _, node = heapq.heappop(self._heap)
            if node.options is not None:
                return node
            if node.is_exact:
                self._bound_options(node)
                self._push(node)
            elif self._refine(node):
                self._push(node)
        return None

    def leaders(self) -> list[Node]:
        """The node with the lowest bound of each of a few meshes: tried first, they soon give a
        good step time to beat, where all nodes with the lowest bounds are of one mesh."""
        found, others = dict[tuple[int, int], Node](), list[Node]()
        while len(found) < MAX_LEADERS and len(found) + len(others) < MAX_COMPARED:
            if (node := self.next(math.inf)) is None:
                break
            if found.setdefault(node.batching.mesh, node) is not node:
                others.append(node)
        for node in others:
            self._push(node)
        return [*found.values(), *self._simple()]

    def _simple(self) -> list[Node]:
        """The most promising nodes that keep off slow links: without a pipeline, and in one host.
        The bounds do not count what pipelines send, so theirs may stay below all others'."""
        room = max(host.num_devices for host in self.problem.cluster.hosts)

        def is_alone(batching: Batching) -> bool:
            return batching.num_pipeline_ranks == 1

        def is_inside(batching: Batching) -> bool:
            return math.prod(batching.mesh) <= room

        found = []
        for wanted in (is_alone, is_inside, lambda one: is_alone(one) and is_inside(one)):
            if (node := self._first(wanted)) is not None:
                self._take(node)
                found.append(node)
        return found

    def _first(self, is_wanted: Callable[[Batching], bool]) -> Node | None:
        """Of such nodes that wait, the one with the lowest bound, all bounds up to date."""
        while True:
            waiting = (node for _, _, node in self._heap if is_wanted(node.batching))
            node = min(waiting, key=lambda one: one.bound_seconds, default=None)
            if node is None or node.bound_seconds == math.inf or node.options is not None:
                return None if node is None or node.bound_seconds == math.inf else node
            if node.is_exact:
                self._bound_options(node)
            elif not self._refine(node):
                self._take(node)

    def _take(self, node: Node) -> None:
        """It waits no longer."""
        self._heap = [entry for entry in self._heap if entry[2] is not node]
        heapq.heapify(self._heap)

    def _refine(self, node: Node) -> bool:
        """A better bound; false where the size cannot be traced."""
        size = node.batching.micro_batch_size
        if node.is_bounded and size not in self.rates.known:
            if not self.sizes.accepts(size):
                self.refused.append(node.batching)
                node.bound_seconds = math.inf
                return False
            self.rates.learn(size)
        batching, floors = node.batching, self.rates.at(size)
        sizes = dict.fromkeys(
            one.partition_group_size for one in all_options(self.problem, batching) if one.partition
        )
        grouped = [self.surroundings(batching, size) for size in sizes]
        bound = quick_seconds(batching, floors, self.surroundings(batching), grouped)
        if (per_rank := self.problem.constraints.stages_per_rank) is not None:
            bound = max(bound, staged_seconds(node.batching, floors, per_rank))
        node.bound_seconds = max(node.bound_seconds, bound)
        node.is_bounded, node.is_exact = True, floors.is_exact
        return True

    def _bound_options(self, node: Node) -> None:
        """Bound each of the options; the node's own bound is the lowest of them."""
        floors = self.rates.at(node.batching.micro_batch_size)
        batching, found = node.batching, list[tuple[float, Options]]()
        for options in all_options(self.problem, batching):
            around = self.surroundings(batching, options.partition_group_size)
            found.append((least_seconds(batching, floors, around, options), options))
        least = min((bound for bound, _ in found), default=math.inf)
        node.bound_seconds = max(node.bound_seconds, least)
        # Of equal bounds, the plainer options stay ahead.
        node.options = sorted((one for one in found if one[0] < math.inf), key=lambda one: one[0])

    def _push(self, node: Node) -> None:
        heapq.heappush(self._heap, (node.bound_seconds, next(self._numbers), node))

    def put_back(self, node: Node) -> None:
        """A node that there was no time for."""
        self._push(node)

    def trials(self, node: Node, best_seconds: float, is_over: Callable[[], bool]) -> list[Trial]:
        """The promising choices of a node, each with the best of a few quick splits.

        `best_seconds` is the step time to beat; `is_over` tells when time is up.
        """
        self.tried.append(node)
        found: list[Trial] = []
        for bound, options in node.options or ():
            least = min([best_seconds, *(trial.objective_seconds for trial in found)])
            if bound >= least * WORTH or is_over():
                continue
            found += self._around(node.batching, options, bound)
        best = min(found, key=lambda trial: trial.objective_seconds, default=None)
        if best is not None and best.split is not None:
            found += self._variants(node.batching, best)
        return found

    def _around(self, batching: Batching, options: Options, bound: float) -> list[Trial]:
        """Numbers of stages per rank: the most, the middle, one; then those around the best."""
        wanted, ranks = self.problem.constraints, batching.num_pipeline_ranks
        counts = stage_counts(wanted, ranks, self.num_layers)
        last, found = len(counts) - 1, dict[int, Trial]()

        def attempt(position: int) -> None:
            if 0 <= position <= last and position not in found:
                per_rank = counts[position]
                choice = choice_of(self.problem, batching, options, stages_per_rank=per_rank)
                found[position] = self.trial(choice, bound)

        for position in (last, last // 2, 0):
            attempt(position)
        for _ in range(2):
            best = min(found, key=lambda position: found[position].objective_seconds, default=0)
            attempt(best + 1)
            attempt(best - 1)
        return list(found.values())

    def trial(self, choice: Choice, bound: float) -> Trial:
        """A choice with a quick split, if one fits; no placement of it is faster than `bound`."""
        instance = self.builder.instance(choice)
        least = least_step_ticks(instance) * instance.tick_seconds
        trial = Trial(instance=instance, bound_seconds=max(bound, least))
        if least_rank_units(instance) > max(instance.limit_units):
            trial.verdict = "infeasible: no rank has the memory that some rank needs"
        elif not trial.offer(sketch(instance)):
            trial.verdict = (
                "infeasible: no split that fits was found, nor proved that there is none"
            )
        return trial

    def _variants(self, batching: Batching, best: Trial) -> list[Trial]:
        """The best choice with other pools and the other layout."""
        choice, bound = best.instance.choice, self.tried[-1].bound_seconds
        options = Options(
            partition=choice.partition,
            offload_state=choice.offload_state,
            offload_inputs=choice.offload_inputs,
            partition_group_size=choice.partition_group_size,
        )
        others = [
            replace(choice, layout=layout)
            for layout in layouts(self.problem, batching, options)
            if layout is not choice.layout
        ]
        if self.problem.constraints.num_buffers is None:
            sizes = {1, 3} - {choice.num_buffers}
            others += [replace(choice, num_buffers=size) for size in sorted(sizes)]
        return [self.trial(other, bound) for other in others]

    def surroundings(self, batching: Batching, partition_group_size: int = 0) -> Surroundings:
        """Of a mesh, where so many replicas divide a state (0: all), made once."""
        key = (*batching.mesh, partition_group_size)
        if key not in self._known:
            self._known[key] = self._surroundings(*key)
        return self._known[key]

    def _surroundings(self, replicas: int, ranks: int, group_size: int) -> Surroundings:
        graph, parts = self._parameters, group_size or replicas
        return Surroundings(
            limit_bytes=np.full(ranks, self._limit_bytes),
            weight_bytes=graph[0],
            trainable_bytes=graph[1],
            tied_bytes=graph[2],
            shard_bytes=graph[3],
            master_bytes=graph[4],
            updated_bytes=graph[5],
            optimizer_slots=self.problem.optimizer_slots,
            num_parts=parts,
            # What passes over the groups besides is left out.
            byte_seconds=(parts - 1) / parts / max(map(self._bandwidth, {parts, replicas})),
            load_byte_seconds=min(1 / (d.host_bandwidth or math.inf) for d in self.rates.devices),
            pass_seconds=min(map(self._latency, {parts, replicas})),
            least_update_seconds=min(d.kernel_overhead_seconds for d in self.rates.devices),
            update_seconds=min(
                2
                * (2 + self.problem.optimizer_slots)
                / (device.memory_bandwidth * (device.update_efficiency or device.memory_efficiency))
                for device in self.rates.updaters
            ),
            updates_compute=not self.problem.updates_on_host,
            recompute=self.problem.constraints.recompute,
        )

    @cached_property
    def _limit_bytes(self) -> float:
        """Of the roomiest device."""
        if self.problem.memory_limit_bytes is not None:
            return float(self.problem.memory_limit_bytes)
        return float(max(d.usable_bytes for d in self.rates.devices))

    def _bandwidth(self, replicas: int) -> float:
        """Bytes per second of the quickest group of so many replicas."""
        links = self._group_links(replicas)
        return max(link.bandwidth / (1 if link.duplex else 2) for link in links)

    def _latency(self, replicas: int) -> float:
        """Seconds in which anything can pass between so many replicas."""
        rounds = num_rounds(replicas, self.problem.cluster.collectives) if replicas > 1 else 0
        return rounds * min(link.latency_seconds for link in self._group_links(replicas))

    def _group_links(self, replicas: int) -> list[Link]:
        """Links that a group of so many replicas may go by: inside a host where it has room."""
        cluster = self.problem.cluster
        roomy = [host.link for host in cluster.hosts if host.num_devices >= replicas]
        return roomy or [cluster.network, *(own.link for own in cluster.host_links)]

    @cached_property
    def _parameters(self) -> np.ndarray:
        """Bytes of each layer's weights, of gradients of those that are trained, of those that are
        tied, of shards, of masters apart from the weights, and of trained weights as they are
        gathered; tied ones once."""
        graph = self.problem.graph_at(next(iter(self.rates.known)))
        specs, seen = graph.parameter_specs, set[str]()
        users = Counter(name for layer in graph.layers for name in set(layer.parameters))
        found = np.zeros((6, self.num_layers))
        for index, layer in enumerate(graph.layers):
            for name in set(layer.parameters) - seen:
                spec = specs[name]
                size, weights = spec.num_bytes, spec.compute_bytes
                trained, tied = spec.trainable, max(size, weights) * (users[name] > 1)
                master = size * bool(spec.compute_dtype)
                found[:, index] += weights, size * trained, tied, size, master, weights * trained
            seen.update(layer.parameters)
        return found
