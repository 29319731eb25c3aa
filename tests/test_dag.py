"""A DAG in contiguous parts: against every split there is, and on the public graphs."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.dnn_partitioning import (
    KNOWN,
    expert_load,
    read_workload,
    solve_workload,
    violations,
)
from benchmarks.dnn_partitioning import (
    main as benchmark,
)
from planner.errors import InfeasibleError, UsageError
from planner.solve.dag import DagNode, DagProblem, Transfer, part_bytes, part_load
from planner.solve.dag_contract import contract
from planner.solve.dag_solve import solve_dag


def random_problem(seed: int, num_nodes: int = 7) -> DagProblem:
    """Small enough to try every split: groups, cycles, hosts, tight memory, host-only nodes."""
    draw = random.Random(seed)
    figures = [draw.choice((0.0, 0.0, 1.0, 2.0, 3.0, 5.0)) for _ in range(num_nodes)]
    nodes = tuple(
        DagNode(
            accelerator_seconds=math.inf if draw.random() < 0.05 else seconds,
            host_seconds=math.inf if draw.random() < 0.05 else seconds * draw.choice((2, 10)),
            num_bytes=draw.choice((0.0, 1.0, 2.0)),
        )
        for seconds in figures
    )
    pairs = [pair for pair in itertools.combinations(range(num_nodes), 2) if draw.random() < 0.3]
    if draw.random() < 0.2:
        pairs.append((draw.randrange(3, num_nodes), draw.randrange(3)))  # perhaps a cycle
    transfers = tuple(
        Transfer(
            maker=maker,
            readers=tuple(reader for first, reader in pairs if first == maker),
            seconds=draw.choice((0.0, 0.1, 0.5, 2.0, 6.0)),
        )
        for maker in sorted({first for first, _ in pairs})
    )
    backward = tuple(
        Transfer(maker=reader, readers=(maker,), seconds=draw.choice((0.1, 1.0)))
        for maker, reader in pairs
        if draw.random() < 0.3
    )
    return DagProblem(
        nodes=nodes,
        edges=tuple(pairs),
        transfers=(*transfers, *backward),
        together=((0, draw.randrange(1, num_nodes)),) if draw.random() < 0.3 else (),
        num_accelerators=draw.randrange(1, 4),
        num_hosts=draw.randrange(2),
        memory_limit_bytes=draw.choice((math.inf, math.inf, 6.0, 4.0)),
    )


def down_closed(problem: DagProblem) -> Iterator[int]:
    for mask in range(1 << len(problem.nodes)):
        groups = all(len({mask >> node & 1 for node in group}) == 1 for group in problem.together)
        if groups and all(mask >> a & 1 or not mask >> b & 1 for a, b in problem.edges):
            yield mask


def least_load(problem: DagProblem) -> float:
    """By trying every chain of down-closed sets; infinite where there is none."""
    masks = list(down_closed(problem))
    full = (1 << len(problem.nodes)) - 1

    def cost(part: int, *, is_host: bool) -> float:
        nodes = [node for node in range(len(problem.nodes)) if part >> node & 1]
        if not is_host and part_bytes(problem, nodes) > problem.memory_limit_bytes:
            return math.inf
        return part_load(problem, nodes, is_host=is_host)

    @cache
    def rest(mask: int, accelerators: int, hosts: int) -> float:
        if mask == full:
            return 0.0
        found = [math.inf]
        for other in masks:
            if other != mask and other & mask == mask:
                if accelerators:
                    load = cost(other & ~mask, is_host=False)
                    found.append(max(load, rest(other, accelerators - 1, hosts)))
                if hosts:
                    load = cost(other & ~mask, is_host=True)
                    found.append(max(load, rest(other, accelerators, hosts - 1)))
        return min(found)

    return rest(0, problem.num_accelerators, problem.num_hosts)


def check(problem: DagProblem, num_sets_limit: int | None = None) -> tuple[float, float, bool]:
    """(load, bound, complete) of the answer, which is a split of the problem."""
    limit = {} if num_sets_limit is None else {"max_sets": num_sets_limit}
    solution = solve_dag(problem, **limit)
    held = [node for part in solution.parts for node in part.nodes]
    assert sorted(held) == list(range(len(problem.nodes)))
    part_of = {node: index for index, part in enumerate(solution.parts) for node in part.nodes}
    assert all(part_of[first] <= part_of[second] for first, second in problem.edges)
    assert all(len({part_of[node] for node in group}) == 1 for group in problem.together)
    hosts = [part.is_host for part in solution.parts]
    assert hosts.count(True) <= problem.num_hosts
    assert hosts.count(False) <= problem.num_accelerators
    for part in solution.parts:
        assert part.load_seconds == part_load(problem, part.nodes, is_host=part.is_host)
        if not part.is_host:
            assert part_bytes(problem, part.nodes) <= problem.memory_limit_bytes
    assert solution.bound_seconds <= solution.load_seconds
    return solution.load_seconds, solution.bound_seconds, solution.is_complete


@pytest.mark.parametrize(
    ("seeds", "num_nodes"), [(range(40), 6), pytest.param(range(300), 7, marks=pytest.mark.slow)]
)
def test_equals_every_split_tried(seeds: range, num_nodes: int) -> None:
    for seed in seeds:
        problem = random_problem(seed, num_nodes)
        least = least_load(problem)
        if math.isinf(least):
            with pytest.raises(InfeasibleError, match="accelerators"):
                solve_dag(problem)
            continue
        load, bound, _ = check(problem)
        assert load == pytest.approx(least, rel=1e-9), seed
        assert bound == pytest.approx(least, rel=1e-9), seed


def test_sets_nearby_never_claim_too_much() -> None:
    for seed in range(20):
        problem = random_problem(seed, 6)
        least = least_load(problem)
        if math.isfinite(least):
            try:
                load, bound, complete = check(problem, 0)
            except InfeasibleError:
                continue
            assert not complete
            assert load >= least * (1 - 1e-9)
            assert bound <= least * (1 + 1e-9)


@pytest.mark.parametrize(
    "seed", [0, *[pytest.param(n, marks=pytest.mark.slow) for n in range(1, 40)]]
)
def test_blocks_equal_every_split_tried(seed: int) -> None:
    """More sets than the small problems have, with lumps, hosts and tight memory."""
    draw = random.Random(seed)
    problem = blocks(2, (1, 2, 2), seed)
    nodes = tuple(
        DagNode(
            accelerator_seconds=node.accelerator_seconds * draw.choice((1, 1, 1, 6)),
            host_seconds=node.accelerator_seconds * draw.choice((2, 8)),
            num_bytes=draw.choice((1.0, 2.0)),
        )
        for node in problem.nodes
    )
    problem = replace(
        problem,
        nodes=nodes,
        num_accelerators=draw.randrange(2, 5),
        num_hosts=draw.randrange(2),
        memory_limit_bytes=draw.choice((math.inf, 9.0)),
    )
    least = least_load(problem)
    if math.isinf(least):
        with pytest.raises(InfeasibleError, match="there is none"):
            solve_dag(problem)
    else:
        load, bound, _ = check(problem)
        assert load == pytest.approx(least, rel=1e-9)
        assert bound == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("num_accelerators", [1, 2, 5])
def test_smallest_problems(num_accelerators: int) -> None:
    one = DagProblem(
        nodes=(DagNode(accelerator_seconds=3.0),),
        edges=(),
        transfers=(),
        num_accelerators=num_accelerators,
    )
    assert check(one)[:2] == (3.0, 3.0)
    none = DagProblem(nodes=(), edges=(), transfers=(), num_accelerators=num_accelerators)
    assert solve_dag(none).parts == ()


def test_node_without_work_joins_its_neighbour() -> None:
    nodes = (
        DagNode(accelerator_seconds=0.0, host_seconds=0.0),
        *[DagNode(accelerator_seconds=1.0)] * 2,
    )
    problem = DagProblem(
        nodes=nodes,
        edges=((0, 1), (1, 2)),
        transfers=(Transfer(maker=0, readers=(1,), seconds=1.0),),
        num_accelerators=2,
    )
    assert contract(problem).members == ((0, 1), (2,))


def test_refuses_what_is_no_problem() -> None:
    node, bad = DagNode(accelerator_seconds=1.0), DagNode(accelerator_seconds=-1.0)
    with pytest.raises(UsageError, match="names node 4, but has 1"):
        solve_dag(DagProblem(nodes=(node,), edges=((0, 4),), transfers=(), num_accelerators=1))
    with pytest.raises(UsageError, match="accelerator_seconds of node 0 is -1"):
        solve_dag(DagProblem(nodes=(bad,), edges=(), transfers=(), num_accelerators=1))
    with pytest.raises(UsageError, match="no device"):
        solve_dag(DagProblem(nodes=(node,), edges=(), transfers=(), num_accelerators=0))


def blocks(num_blocks: int, branches: tuple[int, ...], seed: int) -> DagProblem:
    """Blocks of parallel chains between two joints, as in an Inception network."""
    draw = random.Random(seed)
    nodes, edges = [DagNode(accelerator_seconds=1.0)], []
    for _ in range(num_blocks):
        joint, ends = len(nodes) - 1, []
        for length in branches:
            before = joint
            for _ in range(length):
                nodes.append(DagNode(accelerator_seconds=draw.uniform(0.1, 2.0)))
                edges.append((before, len(nodes) - 1))
                before = len(nodes) - 1
            ends.append(before)
        nodes.append(DagNode(accelerator_seconds=0.1))
        edges += [(end, len(nodes) - 1) for end in ends]
    makers = sorted({first for first, _ in edges})
    return DagProblem(
        nodes=tuple(nodes),
        edges=tuple(edges),
        transfers=tuple(
            Transfer(
                maker=m, readers=tuple(b for a, b in edges if a == m), seconds=draw.uniform(0, 0.1)
            )
            for m in makers
        ),
        num_accelerators=6,
    )


def test_search_nearby_is_close_to_the_whole() -> None:
    problem = blocks(6, (1, 2, 3, 2), seed=1)
    whole, _, complete = check(problem)
    assert complete
    near, bound, complete = check(problem, 100)
    assert not complete
    assert bound <= whole <= near <= whole * 1.002


def graph_files() -> Path:
    folder = Path(os.environ.get("LGA_DATA", "")) / "dnn-partitioning"
    if "LGA_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("LGA_DATA names no folder with the public graphs of dnn-partitioning")
    return folder


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_least_loads(name: str) -> None:
    folder = graph_files()
    workload = read_workload(folder / f"{name}.json")
    solution = solve_workload(workload)
    least, pipedream = KNOWN[name]
    assert violations(workload, solution.parts) == []
    assert solution.load_seconds == pytest.approx(least, rel=1e-5)
    assert solution.bound_seconds == pytest.approx(least, rel=1e-5)
    assert solution.load_seconds <= pipedream * (1 + 1e-5)
    expert = name.replace("training", "inference")
    assert solution.load_seconds <= expert_load(workload, folder / f"{expert}_expert.json")


def test_expert_loads_are_those_published() -> None:
    folder = graph_files()
    for name, load in (("bert24_training", 49.4049), ("resnet50_inference", 43.9183)):
        workload = read_workload(folder / f"{name}.json")
        expert = name.replace("training", "inference")
        assert expert_load(workload, folder / f"{expert}_expert.json") == pytest.approx(
            load, rel=1e-5
        )


def test_backward_nodes_without_a_forward_one_follow_the_mirror(tmp_path: Path) -> None:
    """Nodes 0 -> 1 forward; 2 is 1's backward, 3 has no class, 4 is 0's backward: 2 -> 3 -> 4."""
    nodes = [
        {"id": 10 + i, "supportedOnFpga": True, "fpgaLatency": 1, "cpuLatency": 10, "size": 1,
         "isBackwardNode": i > 1, **({} if i == 3 else {"colorClass": (0, 1, 1, 9, 0)[i]})}
        for i in range(5)
    ]  # fmt: skip
    edges = [
        {"sourceId": 10 + a, "destId": 10 + b, "cost": 0.1}
        for a, b in ((0, 1), (1, 2), (2, 3), (3, 4))
    ]
    data = {"maxSizePerFPGA": 100, "maxFPGAs": 3, "maxCPUs": 0, "nodes": nodes, "edges": edges}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data))
    result = CliRunner().invoke(benchmark, [str(path), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "│ 2.2  │ 2.2   │ 0.000% │" in result.output
    workload = read_workload(path)
    split = tmp_path / "graph_split.json"
    assert json.loads(split.read_text())["maxLoad"] == pytest.approx(2.2)
    assert expert_load(workload, split) == pytest.approx(2.2)
    solution = solve_workload(workload)
    assert [part.nodes for part in solution.parts] in (
        [(0, 4), (3,), (1, 2)],
        [(0, 4, 3), (1, 2)],
        [(0, 4), (1, 2, 3)],
    )
    assert violations(workload, solution.parts) == []
