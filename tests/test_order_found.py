"""The order found for a placement: certified, better than the families, true to the simulator."""

import dataclasses
import random
from functools import cache

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.check import check
from planner.lower import lower
from planner.order import OrderFound, Planned, find_order
from planner.order.build import operations_of, order_of_sequences, sequences_of
from planner.order.families import family_orders
from planner.order.paths import least_makespan, peak_units, times_of
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedule import Order, require_complete
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve.types import Placement

LOOSE = 10**9


class Chain:
    """A chain of layers on a made-up cluster, and its plans."""

    def __init__(
        self,
        num_layers: int,
        num_ranks: int,
        count: int,
        *,
        saved_bytes: int = 1000,
        **more: object,
    ) -> None:
        self.graph = chain_graph(num_layers, skips=more.get("skips", ()))  # type: ignore[arg-type]
        self.profile = chain_profile(
            self.graph,
            saved_bytes=saved_bytes,
            forward_seconds=more.get("forward_seconds", 1.0),  # type: ignore[arg-type]
            backward_seconds=more.get("backward_seconds", 2.0),  # type: ignore[arg-type]
            transient_bytes=more.get("transient_bytes", 0),  # type: ignore[arg-type]
        )
        latency = more.get("latency_seconds", 0.0)
        self.cluster = chain_cluster(num_ranks, latency_seconds=latency)  # type: ignore[arg-type]
        self.num_layers, self.num_ranks, self.count = num_layers, num_ranks, count
        self.planned: Planned = cache(self._planned)

    def placement(
        self, loops: int, schedule: Schedule = Schedule.LAYERED, **more: bool
    ) -> Placement:
        num_stages = loops * self.num_ranks
        return chain_placement(
            num_stages,
            self.num_ranks,
            self.count,
            layers_per_stage=self.num_layers // num_stages,
            schedule=schedule,
            recompute=more.get("recompute", False),
        )

    def find(
        self, loops: int, limit_bytes: int, *, seconds: float = 20.0, **more: bool
    ) -> OrderFound | None:
        return find_order(
            self.planned,
            self.placement(loops, recompute=more.get("recompute", False)),
            (limit_bytes,) * self.num_ranks,
            layered=more.get("layered", False),
            time_limit_seconds=seconds,
        )

    def _planned(self, placement: Placement, order: Order | None) -> tuple[Plan, Simulation]:
        plan = lower(self.graph, self.profile, self.cluster, placement, PlanOptions(), order=order)
        return plan, simulate(plan)


def test_layered_order_is_certified_where_memory_is_loose() -> None:
    """8 ranks, 2 stages each, 16 micro-batches of equal cost."""
    found = Chain(16, 8, 16).find(2, LOOSE)
    assert found is not None
    assert found.best.name == "layered"
    assert found.best.plan.schedule is Schedule.LAYERED
    assert found.gap == 0
    assert found.step_seconds == 16 * 2 * 3 + 7 * 3


def test_better_than_every_family_in_the_memory_of_1f1b() -> None:
    """4 ranks, 8 layers, 8 micro-batches: optimal, and 1F1B takes 16 % longer."""
    chain = Chain(8, 4, 8)
    plan, simulation = chain.planned(chain.placement(1, Schedule.ONE_F_ONE_B), None)
    limit = max(simulation.peak_bytes)
    found = chain.find(2, limit)
    assert found is not None
    assert found.gap == 0
    assert found.best.fits
    assert check(found.best.plan).passed
    assert simulation.step_seconds == 66
    assert found.step_seconds == 57
    families = [tried for tried in found.tried if tried.name not in ("solved", "list")]
    assert {tried.name for tried in families if tried.fits} == {"plain"}
    assert plan.num_stages == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_best_layered_keeps_the_rule_in_less_memory(recompute: bool) -> None:
    chain = Chain(6, 3, 6, forward_seconds=[1.0, 1.5, 1.0, 2.0, 1.0, 1.0], latency_seconds=0.5)
    whole = chain.planned(chain.placement(2, recompute=recompute), None)[1].peak_bytes
    found = chain.find(2, max(whole) - 2 * (4 if recompute else 1000), layered=True,
                       recompute=recompute)  # fmt: skip
    assert found is not None
    assert found.best.plan.schedule is Schedule.CUSTOM
    assert check(found.best.plan).passed
    for rank, program in enumerate(found.best.plan.programs):
        stages = [i.stage for i in program if i.opcode is Opcode.BACKWARD]
        assert stages == sorted(stages, key=lambda stage: -(stage or 0)), rank


def test_bound_is_not_for_halved_backwards() -> None:
    found = Chain(4, 4, 8).find(1, LOOSE)
    assert found is not None
    assert found.best.plan.schedule is Schedule.ZERO_BUBBLE
    assert found.step_seconds < found.bound_seconds
    assert found.gap is None


def test_nothing_fits() -> None:
    assert Chain(4, 2, 4).find(2, 1500) is None


@pytest.mark.parametrize("seed", range(12))
def test_bound_and_memory_hold_against_the_simulator(seed: int) -> None:
    """Whatever the order, the simulator is no faster than the bound, and holds no less."""
    pick = random.Random(seed)
    num_ranks, loops, count = pick.randint(1, 4), pick.randint(1, 3), pick.randint(1, 6)
    num_layers = num_ranks * loops
    skips = [(0, num_layers - 1)] if num_layers > 2 and pick.random() < 0.5 else []
    chain = Chain(
        num_layers,
        num_ranks,
        count,
        saved_bytes=pick.randint(0, 3000),
        forward_seconds=[pick.uniform(0.5, 2.0) for _ in range(num_layers)],
        backward_seconds=[pick.uniform(0.5, 3.0) for _ in range(num_layers)],
        latency_seconds=pick.choice((0.0, 0.3)),
        transient_bytes=pick.choice((0, 500)),
        skips=skips,
    )
    placement = chain.placement(loops, recompute=pick.random() < 0.5)
    plan, _ = chain.planned(placement, None)
    limits = (20_000,) * num_ranks
    operations = operations_of(plan, placement, limits, layered=False)
    bound = least_makespan(operations) * operations.tick_seconds
    for family, order in family_orders(placement):
        sequences = sequences_of(operations, order)
        if sequences is None:
            continue
        _, simulation = chain.planned(family, None)
        assert bound <= simulation.step_seconds * (1 + 1e-9)
        times = times_of(operations, sequences)
        if times is not None:
            assert times.makespan * operations.tick_seconds <= simulation.step_seconds * (1 + 1e-9)
        lack = zip(simulation.peak_bytes, limits, peak_units(operations, sequences),
                   operations.capacity, strict=True)  # fmt: skip
        for peak, limit, units, capacity in lack:
            assert units <= capacity or peak > limit
        again = order_of_sequences(operations, sequences, placement)
        require_complete(again, placement)
        assert again == order


@pytest.mark.parametrize("stage_ranks", [(0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 2, 0)])
@pytest.mark.parametrize("partition", [0, 3])
def test_any_assignment_and_replicas(stage_ranks: tuple[int, ...], partition: int) -> None:
    """Stages anywhere, state partitioned over two replicas: a plan that holds, above its bound."""
    num_ranks = 1 + max(stage_ranks)
    graph = chain_graph(4, tied=[(0, 3)])
    profile = chain_profile(graph, saved_bytes=1000)
    placement = dataclasses.replace(
        chain_placement(4, num_ranks, 5, num_replicas=2, partition=partition),
        stage_ranks=stage_ranks,
    )

    @cache
    def planned(placement: Placement, order: Order | None) -> tuple[Plan, Simulation]:
        cluster = chain_cluster(2 * num_ranks, latency_seconds=0.1)
        plan = lower(graph, profile, cluster, placement, PlanOptions(), order=order)
        return plan, simulate(plan)

    limits = [peak - 1000 for peak in planned(placement, None)[1].peak_bytes]
    found = find_order(planned, placement, limits, time_limit_seconds=2)
    assert found is not None
    assert check(found.best.plan).passed
    assert found.gap is not None
    assert 0 < found.bound_seconds <= found.step_seconds * (1 + 1e-9)
