"""Splits the public layer and operator graphs of real models, and compares with known splits.

The graphs are those of "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS
2020), github.com/msr-fiddle/dnn-partitioning: nodes with seconds on an accelerator and on a CPU,
colour classes that share a device, forward and backward nodes, and the time to move each node's
output. The largest load of any device is to be least.

    python benchmarks/dnn_partitioning.py [FOLDER_OR_FILE...] [--output FOLDER]

Without arguments it reads the folder `dnn-partitioning` in LGA_DATA.
Beside each graph `NAME.json`, an expert's split may stand as `NAME_expert.json`; that of an
inference graph serves the training graph too, as backward nodes follow their colour class.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import networkx
from rich.console import Console
from rich.table import Table

from planner.files import write_whole
from planner.solve.dag import (
    DagNode,
    DagPart,
    DagProblem,
    DagSolution,
    Transfer,
    part_bytes,
    part_load,
)
from planner.solve.dag_solve import solve_dag

__all__ = [
    "Workload",
    "expert_load",
    "main",
    "read_workload",
    "solve_workload",
    "split_file",
    "violations",
]

KNOWN = {
    "bert24_inference": (17.7899, 17.7899),
    "bert24_training": (41.7458, 187.914),
    "resnet50_inference": (33.7747, 39.3981),
    "resnet50_training": (78.6318, 83.6744),
}
"""Least load by the authors' exact dynamic programme, and that of their PipeDream baseline, for
the graphs known by these names (of layers)."""

FIRST_SHARE = 0.7
"""Of the time limit, for the answer that may have to be asked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A graph of the collection."""

    problem: DagProblem
    ids: tuple[int, ...]
    """Of each node of the problem, in the file."""
    is_backward: tuple[bool, ...]
    """Of each node."""
    edges: tuple[tuple[int, int], ...]
    """All of the file, between nodes of the problem; the problem orders those that bind."""


def read_workload(path: Path) -> Workload:
    """The graph of a file.

    Forward nodes are ordered by their edges. Backward nodes follow their colour class, and where
    that has no forward node, the forward order is the mirror of their edges.
    """
    data = json.loads(path.read_text())
    position = {node["id"]: index for index, node in enumerate(data["nodes"])}
    is_backward = tuple(bool(node["isBackwardNode"]) for node in data["nodes"])
    edges = tuple((position[e["sourceId"]], position[e["destId"]]) for e in data["edges"])
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, node in enumerate(data["nodes"]):
        groups[node.get("colorClass", f"node {index}")].append(index)
    orphans = {
        node for group in groups.values() if all(is_backward[n] for n in group) for node in group
    }
    costs = {position[edge["sourceId"]]: float(edge["cost"]) for edge in data["edges"]}
    readers: dict[int, list[int]] = defaultdict(list)
    for source, reader in edges:
        readers[source].append(reader)
    problem = DagProblem(
        nodes=tuple(
            DagNode(
                accelerator_seconds=(
                    float(node["fpgaLatency"]) if node["supportedOnFpga"] else float("inf")
                ),
                host_seconds=float(node["cpuLatency"]),
                num_bytes=float(node.get("size", 0)),
            )
            for node in data["nodes"]
        ),
        edges=(
            *(edge for edge in edges if not any(is_backward[node] for node in edge)),
            *_mirrored(edges, is_backward, orphans),
        ),
        transfers=tuple(
            Transfer(maker=maker, readers=tuple(sorted(set(found))), seconds=costs[maker])
            for maker, found in sorted(readers.items())
        ),
        together=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        num_accelerators=int(data["maxFPGAs"]),
        num_hosts=int(data["maxCPUs"]),
        memory_limit_bytes=float(data["maxSizePerFPGA"]),
    )
    return Workload(problem=problem, ids=tuple(position), is_backward=is_backward, edges=edges)


def _mirrored(
    edges: Iterable[tuple[int, int]], is_backward: tuple[bool, ...], nodes: Iterable[int]
) -> Iterable[tuple[int, int]]:
    """Backward edges at these nodes, turned round."""
    chosen = set(nodes)
    return (
        (reader, source)
        for source, reader in edges
        if is_backward[source] and is_backward[reader] and not chosen.isdisjoint((source, reader))
    )


def solve_workload(workload: Workload, time_limit_seconds: float = 9.0) -> DagSolution:
    """The best split; in training graphs contiguous for the backward nodes too.

    Backward edges are mirrored only where the first answer breaks that: colour classes settle it
    where backward is the mirror of forward.
    """
    started = time.monotonic()
    solution = solve_dag(workload.problem, time_limit_seconds=FIRST_SHARE * time_limit_seconds)
    if not violations(workload, solution.parts):
        return solution
    nodes = [node for node, backward in enumerate(workload.is_backward) if backward]
    mirrored = _mirrored(workload.edges, workload.is_backward, nodes)
    strict = replace(workload.problem, edges=(*workload.problem.edges, *mirrored))
    left = time_limit_seconds - (time.monotonic() - started)
    return solve_dag(strict, time_limit_seconds=left)


def split_file(workload: Workload, solution: DagSolution) -> str:
    """The split in the collection's own format."""
    devices: dict[str, list[dict[str, Any]]] = {"fpgas": [], "cpus": []}
    for part in solution.parts:
        nodes = sorted(workload.ids[node] for node in part.nodes)
        kind = "cpus" if part.is_host else "fpgas"
        devices[kind].append({"load": part.load_seconds, "nodes": nodes})
    return json.dumps({"maxLoad": solution.load_seconds, **devices}, indent=1)


def violations(workload: Workload, parts: Iterable[DagPart]) -> list[str]:
    """What is wrong with a split, by the statement of the problem."""
    problem, parts = workload.problem, list(parts)
    found = []
    held = sorted(node for part in parts for node in part.nodes)
    if held != list(range(len(problem.nodes))):
        found.append("not every node is in one part")
    of = {node: index for index, part in enumerate(parts) for node in part.nodes}
    if sum(part.is_host for part in parts) > problem.num_hosts:
        found.append("too many hosts")
    if sum(not part.is_host for part in parts) > problem.num_accelerators:
        found.append("too many accelerators")
    for index, part in enumerate(parts):
        bytes_needed = part_bytes(problem, part.nodes)
        if not part.is_host and bytes_needed > problem.memory_limit_bytes * (1 + 1e-9):
            found.append(f"part {index} needs {bytes_needed:g} bytes")
    found += [f"{group} is apart" for group in problem.together if len({of[n] for n in group}) > 1]
    for backward in (False, True):
        chosen = [
            n for n, is_backward in enumerate(workload.is_backward) if is_backward == backward
        ]
        graph: networkx.DiGraph[int] = networkx.DiGraph()
        graph.add_nodes_from(chosen)
        graph.add_edges_from(
            edge
            for edge in workload.edges
            if all(workload.is_backward[n] == backward for n in edge)
        )
        found += _broken(graph, parts, "backward" if backward else "forward")
    return found


def _broken(
    graph: "networkx.DiGraph[int]", parts: Iterable[DagPart], direction: str
) -> Iterable[str]:
    """Parts that a path leaves and enters again."""
    for index, part in enumerate(parts):
        own = {node for node in part.nodes if node in graph}
        after, before = set(own), set(own)
        for node in networkx.topological_sort(graph):
            if not after.isdisjoint(graph.predecessors(node)):
                after.add(node)
        for node in reversed(list(networkx.topological_sort(graph))):
            if not before.isdisjoint(graph.successors(node)):
                before.add(node)
        if (after & before) - own:
            yield f"part {index} is not contiguous in {direction}"


def expert_load(workload: Workload, path: Path) -> float:
    """The largest load of a split in the collection's format."""
    data: Mapping[str, Any] = json.loads(path.read_text())
    index = {number: node for node, number in enumerate(workload.ids)}
    group_of = {node: group for group in workload.problem.together for node in group}
    loads = [0.0]
    for kind in ("cpus", "fpgas"):
        for device in data[kind]:
            named = [index[number] for number in device["nodes"]]
            held = {node for name in named for node in group_of.get(name, (name,))}
            loads.append(part_load(workload.problem, held, is_host=kind == "cpus"))
    return max(loads)


def _expert_path(path: Path) -> Path | None:
    names = (
        f"{path.stem}_expert.json",
        f"{path.stem.replace('training', 'inference')}_expert.json",
    )
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _row(path: Path, output: Path | None) -> list[str]:
    workload, expert = read_workload(path), _expert_path(path)
    started, started_cpu = time.monotonic(), time.process_time()
    solution = solve_workload(workload)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu
    if output is not None:
        write_whole(output / f"{path.stem}_split.json", split_file(workload, solution).encode())
    known, pipedream = KNOWN.get(path.stem, (None, None))
    return [
        path.stem,
        str(len(workload.problem.nodes)),
        _number(solution.load_seconds),
        _number(solution.bound_seconds),
        f"{solution.gap:.3%}",
        _number(known),
        _number(pipedream),
        _number(expert_load(workload, expert) if expert else None),
        f"{solution.num_sets}{'' if solution.is_complete else ' of more'}",
        f"{seconds:.2f}",
        f"{cpu_seconds:.2f}",
        "; ".join(violations(workload, solution.parts)),
    ]


@click.command(help=(__doc__ or "").split("\n")[0])
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--output",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Write each split into this folder, in the collection's format.",
)
def main(paths: tuple[Path, ...], output: Path | None) -> None:
    """Print the table of all graphs named: files, or folders of them."""
    if not paths:
        if "LGA_DATA" not in os.environ:
            raise click.UsageError("name files, or set LGA_DATA to the folder of public data")
        paths = (Path(os.environ["LGA_DATA"]) / "dnn-partitioning",)
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])
    ]
    names = "graph,nodes,load,bound,gap,known,PipeDream,expert,sets,seconds,of CPU,wrong"
    table = Table(*names.split(","), title="largest load of a device")
    for file in files:
        if not file.stem.endswith(("_expert", "_split")):
            table.add_row(*_row(file, output))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
