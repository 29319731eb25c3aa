"""Orders of compute by search: against all orders of small problems, in memory, and in the runtime.

The brute force shares no code with `planner.order`: it enumerates every order of every rank.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from functools import cache

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.check import check
from planner.lower import lower
from planner.order import OrderFound, Planned, find_order
from planner.order.build import operations_of, order_of_sequences, sequences_of
from planner.order.extend import extended, shortened
from planner.order.families import family_orders
from planner.order.improve import best_start, fits
from planner.order.lists import POLICIES, list_order, policy
from planner.order.model import solve_order
from planner.order.operations import Hop, Operations
from planner.order.paths import least_makespan, peak_units, times_of
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedule import Order, require_complete
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve.types import Placement

LOOSE = 10**9


def problem(
    num_ranks: int,
    loops: int,
    count: int,
    *,
    forward: tuple[int, ...] = (),
    backward: tuple[int, ...] = (),
    rebuild: tuple[int, ...] = (),
    update: tuple[int, ...] = (),
    lag: int = 0,
    capacity: int = LOOSE,
    layered: bool = False,
) -> Operations:
    """A chain of stages, stage s on rank s mod P, each of which holds one unit per micro-batch."""
    num_stages = num_ranks * loops
    nothing = (0,) * num_stages
    pairs = list(itertools.pairwise(range(num_stages)))
    return Operations(
        num_micro_batches=count,
        stage_ranks=tuple(stage % num_ranks for stage in range(num_stages)),
        forward=forward or (1,) * num_stages,
        rebuild=rebuild or nothing,
        backward=backward or (2,) * num_stages,
        arrivals=tuple(Hop(source=a, target=b, ticks=lag) for a, b in pairs),
        returns=tuple(Hop(source=b, target=a, ticks=lag) for a, b in pairs),
        update=update or nothing,
        held=(1,) * num_stages,
        forward_extra=nothing,
        backward_extra=nothing,
        capacity=(capacity,) * num_ranks,
        layered=layered,
        tick_seconds=1.0,
        unit_bytes=1,
    )


def random_problem(seed: int, *, layered: bool = False) -> Operations:
    """So small that all its orders can be looked at."""
    pick = random.Random(seed)
    num_ranks, loops, count = pick.choice([(2, 1, 4), (3, 1, 3), (2, 2, 2), (1, 2, 3)])
    num_stages = num_ranks * loops
    least = loops if not layered else (loops - 1) * count + 1

    def ticks(most: int) -> tuple[int, ...]:
        return tuple(pick.randint(1, most) for _ in range(num_stages))

    return problem(
        num_ranks,
        loops,
        count,
        forward=ticks(5),
        backward=ticks(9),
        rebuild=ticks(4) if pick.random() < 0.4 else (),
        update=ticks(4) if pick.random() < 0.3 else (),
        lag=pick.choice((0, 0, 1, 3)),
        capacity=pick.randint(least, least + 3),
        layered=layered,
    )


def exhaustive(operations: Operations) -> int | None:
    """The shortest makespan of all orders that fit in memory."""
    ranks = [
        list(_rank_orders(operations, operations.stages_of(rank)))
        for rank in range(operations.num_ranks)
    ]
    found = (_makespan(operations, orders) for orders in itertools.product(*ranks))
    return min((makespan for makespan in found if makespan is not None), default=None)


Step = tuple[str, int, int]


def _rank_orders(operations: Operations, stages: list[int]) -> Iterator[tuple[Step, ...]]:
    """Interleavings of a rank's passes: a pass takes micro-batches ascending, a micro-batch goes
    forward through its stages and back."""
    passes = [("F", stage) for stage in stages] + [("B", stage) for stage in reversed(stages)]
    capacity = operations.capacity[operations.stage_ranks[stages[0]]]

    def extend(
        done: dict[tuple[str, int], int], order: tuple[Step, ...]
    ) -> Iterator[tuple[Step, ...]]:
        if len(order) == len(passes) * operations.num_micro_batches:
            yield order
            return
        held = sum(done["F", stage] - done["B", stage] for stage in stages)
        for index, (kind, stage) in enumerate(passes):
            count = done[kind, stage]
            before = done[passes[index - 1]] if index else operations.num_micro_batches
            if count >= before or (kind == "F" and held >= capacity):
                continue
            later = [other for other in stages if other > stage]
            if (
                operations.layered
                and kind == "B"
                and any(done["B", other] < operations.num_micro_batches for other in later)
            ):
                continue
            yield from extend({**done, (kind, stage): count + 1}, (*order, (kind, stage, count)))

    yield from extend(dict.fromkeys(passes, 0), ())


def _makespan(operations: Operations, orders: tuple[tuple[Step, ...], ...]) -> int | None:
    """Of one order for each rank, by running it."""
    forward_hops = {hop.target: hop for hop in operations.arrivals}
    backward_hops = {hop.target: hop for hop in operations.returns}
    ends: dict[Step, int] = {}
    places, now = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                kind, stage, m = order[places[rank]]
                hop = (forward_hops if kind == "F" else backward_hops).get(stage)
                need = None if hop is None else (kind, hop.source, m)
                if need is not None and need not in ends:
                    break
                ready = 0 if hop is None or need is None else ends[need] + hop.ticks
                if kind == "F":
                    end = max(now[rank], ready) + operations.forward[stage]
                else:
                    again = now[rank] + operations.rebuild[stage]
                    end = max(again, ready) + operations.backward[stage]
                ends[kind, stage, m] = now[rank] = end
                if kind == "B" and m == operations.num_micro_batches - 1:
                    now[rank] += operations.update[stage]
                places[rank] += 1
                moved = True
    complete = all(place == len(order) for place, order in zip(places, orders, strict=True))
    return max(now) if complete else None


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("layered", [False, True])
def test_optimum_of_small_problems(seed: int, layered: bool) -> None:
    operations = random_problem(seed, layered=layered)
    best = exhaustive(operations)
    start = best_start(operations)
    assert best is not None
    assert start is not None
    assert least_makespan(operations) <= best
    solved = solve_order(operations, start, time_limit_seconds=20, seed=0)
    assert solved.proved
    assert solved.times.makespan == best
    assert fits(operations, solved.times.sequences)


@pytest.mark.parametrize("seed", range(20))
def test_lists_fit_in_memory_and_come_to_their_end(seed: int) -> None:
    pick = random.Random(seed)
    num_ranks, loops, count = pick.randint(1, 5), pick.randint(1, 3), pick.randint(1, 9)
    capacity = pick.randint(loops, loops * num_ranks + 2)
    operations = problem(num_ranks, loops, count, lag=pick.randint(0, 2), capacity=capacity)
    for name in POLICIES:
        sequences = list_order(operations, policy(name, operations))
        assert sequences is not None
        assert fits(operations, sequences)
        assert sorted(itertools.chain(*sequences)) == list(range(operations.num_operations))
        times = times_of(operations, sequences)
        assert times is not None
        assert times.makespan >= least_makespan(operations)


def test_no_list_where_not_one_micro_batch_fits() -> None:
    operations = problem(3, 2, 4, capacity=1)
    assert list_order(operations, policy("backward first", operations)) is None
    assert best_start(operations) is None


@pytest.mark.parametrize(("num_ranks", "loops", "count"), [(2, 1, 23), (4, 2, 40), (3, 2, 64)])
def test_patterns_made_longer(num_ranks: int, loops: int, count: int) -> None:
    operations = problem(num_ranks, loops, count, capacity=num_ranks * loops, lag=1)
    few = shortened(operations, 10_000)
    assert few is not None
    assert few.num_micro_batches < count
    start = best_start(few)
    assert start is not None
    found = extended(operations, few, start)
    assert found is not None
    assert fits(operations, found.sequences)
    assert sorted(itertools.chain(*found.sequences)) == list(range(operations.num_operations))
    plain = times_of(operations, list_order(operations, policy("oldest first", operations)) or ())
    assert plain is not None
    assert found.makespan <= 1.05 * plain.makespan


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


def test_one_seed_one_answer() -> None:
    operations = dataclasses.replace(
        problem(3, 2, 5, capacity=4, lag=1), forward=(3, 1, 2, 3, 1, 4)
    )
    start = best_start(operations)
    assert start is not None
    found = [solve_order(operations, start, time_limit_seconds=60, seed=3) for _ in range(2)]
    assert found[0] == found[1]


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
