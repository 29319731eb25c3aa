"""Measures a cluster: `torchrun ... -m runtime.profile_cluster --output cluster.yaml`.

One process per device, as in training; each measures its links to others with the calls that plans
run on, and the first of each host its device. Rank 0 writes the cluster file. Knows the command
line and the order of things; does not know how anything is timed.
"""

import datetime
import os
import platform
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
from rich.console import Console

from planner.cluster.measured import FoundHost, assemble, cluster_text
from planner.cluster.samples import MeasuredSpec
from planner.cluster.schema import ClusterFile
from planner.console import (
    DEVICES,
    HELP,
    SECONDS,
    check_can_write,
    command_errors,
    console,
    error_console,
)
from planner.cost.algorithm import with_algorithm
from planner.errors import UsageError
from planner.files import write_text
from planner.layouts import Grid
from planner.report.measured_cluster import cluster_tables
from planner.report.quantities import parse_bytes
from runtime.ending import last_words
from runtime.launch import run_ranks
from runtime.places import check_devices, find_hosts, first_of_host, notes_on
from runtime.probe_plan import probe_plan
from runtime.session import distributed_session
from runtime.survey import Survey, survey

__all__ = ["Options", "main", "profile_rank"]

_LARGEST_BYTES = {"cpu": 2**24, "cuda": 2**28}
_SMALLEST_BYTES = 4096
"""Below this no bandwidth can be told from latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asks of one measurement."""

    output: Path
    name: str | None
    """Of the cluster; the output's name without its ending where None."""
    device: str
    """`cpu` or `cuda`."""
    largest_bytes: int
    host_name: str
    deadline_seconds: float


@click.command(name="python -m runtime.profile_cluster", context_settings=HELP)
@click.option("--cluster", "is_cluster", is_flag=True, hidden=True)
@click.option(
    "--gpus",
    type=DEVICES,
    help="Processes to start on this machine, one per device; without it, a launcher such as "
    "torchrun has started them.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("cluster.yaml"),
    show_default=True,
    help="File to write the cluster to.",
)
@click.option("--name", help="Of the cluster  [default: the file's name without its ending]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="What each process drives; cuda measures NCCL, cpu gloo  [default: cuda where torch "
    "finds it]",
)
@click.option(
    "--largest",
    metavar="SIZE",
    help="Of the largest message, such as 64MiB  [default: 16MiB on cpu, 256MiB on cuda]",
)
@click.option(
    "--host-name",
    help="Ranks with one name share a host  [default: what the machine calls itself]",
)
@click.option(
    "--deadline",
    "deadline_seconds",
    type=SECONDS,
    default=60.0,
    show_default=True,
    help="Longest wait for any transfer between ranks.",
)
@command_errors()
def main(
    is_cluster: bool,
    gpus: int | None,
    output: Path,
    name: str | None,
    device: str | None,
    largest: str | None,
    host_name: str | None,
    deadline_seconds: float,
) -> None:
    """Measure the links and devices of a cluster, and write the file that `lga-plan --cluster`
    reads.

    On one machine, `--gpus N` starts the processes. On several, start one per device with
    `torchrun ... -m runtime.profile_cluster`, which takes the same options.
    """
    del is_cluster  # how lga-profile was told what to do
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    largest_bytes = _LARGEST_BYTES[kind] if largest is None else parse_bytes(largest)
    if largest_bytes < _SMALLEST_BYTES:
        raise UsageError(
            f"--largest is {largest_bytes} bytes, of which only latency could be told",
            hint=f"give at least {_SMALLEST_BYTES} bytes, such as 16MiB",
        )
    if gpus is not None:
        check_can_write(output, "--output")
        check_devices(kind, gpus)
        sys.exit(_start(gpus))
    options = Options(
        output=output,
        name=name,
        device=kind,
        largest_bytes=largest_bytes,
        host_name=host_name or socket.gethostname(),
        deadline_seconds=deadline_seconds,
    )
    with last_words():
        profile_rank(options)


def profile_rank(options: Options) -> None:
    """Everything that one process does.

    Raises:
        UsageError: not started by a launcher, no device for this rank, ranks of a host that do not
            follow each other or have unlike devices, or the file cannot be written.
        RunError: a rank was lost or a deadline passed.
    """
    world_size = _world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_devices(options.device, local_rank + 1)
    device = torch.device("cpu")
    if options.device == "cuda":
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    if os.environ.get("RANK") == "0":
        check_can_write(options.output, "--output")
    backend = "nccl" if options.device == "cuda" else "gloo"
    plan = probe_plan(world_size, 1, backend, options.deadline_seconds)
    with distributed_session(plan, device) as (_, rank):
        hosts, places = find_hosts(options.host_name, device, world_size)
        say = error_console.print if rank == 0 else Console(quiet=True).print
        whole = Survey(
            rank=rank,
            hosts=hosts,
            backend=backend,
            device=device,
            deadline_seconds=options.deadline_seconds,
            largest_bytes=options.largest_bytes,
            say=say,
        )
        found = survey(whole)
        say("devices")
        first = first_of_host(rank, hosts, device, found.message_seconds)
        everyone: list[FoundHost | None] = [None] * world_size
        dist.all_gather_object(everyone, first)
        if rank == 0:
            measured = MeasuredSpec(
                date=datetime.date.today().isoformat(),
                command=_command(world_size),
                versions=_versions(backend),
                notes=notes_on(places, hosts),
                samples=found.samples,
                overlaps=found.overlaps,
            )
            name = options.name or options.output.stem
            known = [host for host in everyone if host is not None]
            _write(with_algorithm(assemble(name, backend, known, measured)), options.output)


def _write(file: ClusterFile, output: Path) -> None:
    write_text(output, cluster_text(file), hint="give another path with --output")
    for table in cluster_tables(file):
        console.print(table)
        console.print()
    console.print(f"cluster written to {output}; lga-plan MODEL --cluster {output} plans for it")


def _start(num_processes: int) -> int:
    """The same command line, without --gpus, in so many processes of this machine."""
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--gpus starts the processes itself, but this is already inside a launcher "
            f"(WORLD_SIZE is {os.environ['WORLD_SIZE']})",
            hint="leave out --gpus",
        )
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--gpus" and not word.startswith("--gpus="):
            words.append(word)
        skip = not skip and word == "--gpus"
    grid = Grid(num_replicas=1, num_pipeline_ranks=num_processes)
    return run_ranks(["-m", "runtime.profile_cluster", *words], grid)


def _world_size() -> int:
    try:
        return int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UsageError(
            "this process was not started by a launcher: WORLD_SIZE is not set",
            hint="give --gpus N to start N processes here, or start one per device with "
            "torchrun --nproc-per-node N -m runtime.profile_cluster",
        ) from None


def _command(world_size: int) -> str:
    words = shlex.join(["python", "-m", "runtime.profile_cluster", *sys.argv[1:]])
    return f"{words} (as each of {world_size} ranks)"


def _versions(backend: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if backend == "nccl":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["cuda"] = str(torch.version.cuda)
    return versions


if __name__ == "__main__":
    main()
