"""What running forward again takes: as measured, in the simulator, the solver and its bounds."""

import random
from dataclasses import replace
from functools import cache

import pytest
from solve_chain import choice_of, make_cluster
from test_solve_floor import floors_of
from test_solve_simulated import (
    EXACT,
    NUM_LAYERS,
    chain_problem,
    modelled_seconds,
    random_placement,
    simulate_placement,
)

from planner.lower import lower
from planner.plan.types import Opcode, PlanOptions
from planner.profile import Profile
from planner.simulate import simulate
from planner.solve import Problem
from planner.solve.bounds import least_step_ticks
from planner.solve.branch import Branches
from planner.solve.build import Builder
from planner.solve.entry import Clock
from planner.solve.rates import Rates
from planner.solve.sizes import Sizes


def measured_problem(
    generator: random.Random, ranks: int, factor: float, *, message_seconds: float
) -> Problem:
    """A chain whose layers' second forwards take `factor` times as long as their first."""
    cluster = make_cluster(ranks, bandwidth=1e10, message_seconds=message_seconds)
    problem = chain_problem(generator, ranks, cluster)

    @cache
    def profile_at(size: int) -> Profile:
        found = problem.profile_at(size)
        layers = (
            replace(layer, recompute_seconds=factor * layer.forward[0].flop / 1e12)
            for layer in found.layers
        )
        return replace(found, layers=tuple(layers))

    return replace(problem, profile_at=profile_at)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [0.3, 1.4])
def test_measured_recompute_is_simulated_modelled_and_bounded(seed: int, factor: float) -> None:
    generator = random.Random(seed)
    ranks = generator.choice([1, 2, 3])
    messages = generator.choice([0.0, 3e-4])
    problem = measured_problem(generator, ranks, factor, message_seconds=messages)
    placement = random_placement(
        generator, 1, ranks, generator.choice([1, 3, 8]), offload_inputs=False, offload_state=False
    )
    for recompute in (True, False):
        placement = replace(placement, recompute=(recompute,) * placement.num_stages)
        step = simulate_placement(problem, placement).step_seconds
        assert modelled_seconds(problem, placement) == pytest.approx(step, rel=EXACT)
        choice = replace(choice_of(placement), recompute=recompute)
        wanted = replace(problem.constraints, recompute=recompute)
        demanded = replace(problem, constraints=wanted)
        instance = Builder(problem=demanded).instance(choice)
        assert least_step_ticks(instance) * instance.tick_seconds <= step * (1 + EXACT)
        branches = Branches(
            problem=demanded,
            num_layers=NUM_LAYERS,
            sizes=Sizes(problem=demanded, clock=Clock(limit_seconds=1.0)),
            builder=Builder(problem=demanded),
            rates=Rates(problem=demanded),
        )
        branches.rates.learn(placement.micro_batch_size)
        assert max(floors_of(branches, placement)) <= step * (1 + EXACT)


def test_a_recompute_takes_what_was_measured_and_sends_nothing() -> None:
    """In the plan and in the simulator; the forward keeps its messages."""
    message = 3e-4
    problem = measured_problem(random.Random(1), 2, 0.25, message_seconds=message)
    placement = random_placement(random.Random(1), 1, 2, 3, offload_inputs=False)
    placement = replace(placement, recompute=(True,) * placement.num_stages)
    graph, profile = problem.graph_at(2), problem.profile_at(2)
    plan = lower(graph, profile, problem.cluster, placement, PlanOptions())
    bare = lower(
        graph,
        replace(profile, layers=tuple(replace(x, recompute_seconds=None) for x in profile.layers)),
        problem.cluster,
        placement,
        PlanOptions(),
    )
    for stage, without in zip(plan.stages, bare.stages, strict=True):
        assert stage.forward_seconds == without.forward_seconds
        assert stage.recompute_seconds is not None
        assert without.recompute_seconds is not None
        assert stage.recompute_seconds == pytest.approx(0.25 * without.recompute_seconds, rel=1e-6)
        num_messages = (without.forward_seconds - without.recompute_seconds) / message
        assert num_messages == pytest.approx(round(num_messages))
        assert round(num_messages) >= 1
    again = []
    for event in simulate(plan).timeline.events:
        instruction = plan.programs[event.rank][event.index]
        if instruction.opcode is Opcode.RECOMPUTE and instruction.stage == 0:
            again.append(event.end_seconds - event.start_seconds)
    assert again == pytest.approx([plan.stages[0].recompute_seconds] * 3)
