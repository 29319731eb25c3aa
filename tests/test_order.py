"""Orders of compute by search: against all orders of small problems, in memory, and in the runtime.

The brute force shares no code with `planner.order`: it enumerates every order of every rank.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest

from planner.order.extend import extended, shortened
from planner.order.improve import best_start, fits
from planner.order.lists import POLICIES, list_order, policy
from planner.order.model import solve_order
from planner.order.operations import Hop, Operations
from planner.order.paths import least_makespan, times_of

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


def test_one_seed_one_answer() -> None:
    operations = dataclasses.replace(
        problem(3, 2, 5, capacity=4, lag=1), forward=(3, 1, 2, 3, 1, 4)
    )
    start = best_start(operations)
    assert start is not None
    found = [solve_order(operations, start, time_limit_seconds=60, seed=3) for _ in range(2)]
    assert found[0] == found[1]
