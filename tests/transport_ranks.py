"""What each rank does in the transport's tests: the same under threads and under processes.

As a program (`python tests/transport_ranks.py SCENARIO PLAN OUTPUT`) it is one gloo rank; PLAN is
a pickled Plan and the scenario's result goes to OUTPUT.<rank>.
"""

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from planner.plan.types import Plan
from runtime.exchange import ExchangeTransport
from runtime.failure import FailureReport, end_process
from runtime.session import distributed_session

SIZES = (1, 7, 64)
KINDS = ("send", "gather", "reduce", "reduce_tied", "world")


def values(world_rank: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers whose sum depends, in its last bits, on the order of addition."""
    generator = torch.Generator().manual_seed(1000 * size + world_rank)
    return torch.randn(size, generator=generator).to(dtype)


def every_call(transport: ExchangeTransport, world_rank: int, plan: Plan) -> dict[str, Tensor]:
    pipeline_rank, _ = plan.coordinates(world_rank)
    num_ranks, num_parts = plan.num_pipeline_ranks, plan.grid.num_parts
    found: dict[str, Tensor] = {}
    for size in SIZES:
        gathered = torch.full((size * num_parts,), torch.nan)
        transport.gather(values(world_rank, size), gathered, "gather").wait()
        found[f"gather {size}"] = gathered
        part = torch.full((size,), torch.nan)
        source = values(world_rank, size * num_parts)
        transport.reduce_scatter(source, part, "reduce").wait()
        found[f"reduce_scatter {size}"] = part
        for dtype in (torch.float32, torch.bfloat16) if plan.partition < 2 else ():
            whole = values(world_rank, size, dtype)
            pending = transport.all_reduce(whole, "all_reduce")
            pending.wait()
            pending.wait()
            found[f"all_reduce {size} {dtype}"] = whole
        for unit in plan.units:
            if pipeline_rank in unit.ranks:
                tied = values(world_rank, size)
                transport.all_reduce_tied(tied, unit.ranks, "tied").wait()
                found[f"tied {unit.ranks} {size}"] = tied
        world = values(world_rank, size).double()
        transport.all_reduce_world(world, "world").wait()
        found[f"world {size}"] = world
        if num_ranks > 1:
            following, previous = (pipeline_rank + 1) % num_ranks, (pipeline_rank - 1) % num_ranks
            arriving = torch.full((size,), torch.nan)
            received = transport.receive(previous, arriving, "from the previous rank")
            sent = transport.send(following, values(world_rank, size), "to the next rank")
            received.wait()
            sent.wait()
            found[f"ring {size}"] = arriving
    found["traffic"] = torch.tensor([transport.traffic.num_bytes.get(kind, 0) for kind in KINDS])
    return found


def many_at_once(transport: ExchangeTransport, world_rank: int, plan: Plan) -> dict[str, Tensor]:
    """Both directions full of messages, sends first, while collectives run."""
    pipeline_rank, _ = plan.coordinates(world_rank)
    peer, size = 1 - pipeline_rank, 20_000
    messages = [values(world_rank, size + i) for i in range(12)]
    arriving = [torch.full((size + i,), torch.nan) for i in range(12)]
    wholes = [values(world_rank, 1001 + i) for i in range(4)]
    pending = [transport.send(peer, tensor, "message") for tensor in messages]
    pending += [transport.all_reduce(whole, "sum") for whole in wholes]
    pending += [transport.receive(peer, tensor, "message") for tensor in arriving]
    for item in pending if pipeline_rank else reversed(pending):
        item.wait()
    names = [f"message {i}" for i in range(12)] + [f"sum {i}" for i in range(4)]
    return dict(zip(names, arriving + wholes, strict=True))


def silent_peer(transport: ExchangeTransport, world_rank: int, plan: Plan) -> dict[str, Tensor]:
    """Rank 1 never sends what rank 0 waits for, and lives on until rank 0 has given up."""
    if world_rank == 0:
        transport.receive(1, torch.empty(4), "FORWARD input h.3 of micro-batch 2").wait()
    else:
        time.sleep(3 * plan.options.deadline_seconds)
    return {}


def _lose_rank_1(
    how: Callable[[], None], *, in_world: bool = False
) -> Callable[..., dict[str, Tensor]]:
    def scenario(transport: ExchangeTransport, world_rank: int, _: Plan) -> dict[str, Tensor]:
        tensor = torch.zeros(4)
        add = transport.all_reduce_world if in_world else transport.all_reduce
        add(tensor, "first sum").wait()
        if world_rank == 1:
            how()
        add(tensor, "second sum").wait()
        return {}

    return scenario


def killed_in_collective(_: object, world_rank: int, __: Plan) -> dict[str, Tensor]:
    """The others lose rank 1 in a call that the transport does not know of."""
    if world_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(4))
    return {}


def _fail() -> None:
    raise ValueError("the loss is a teapot")


SCENARIOS: dict[str, Callable[[ExchangeTransport, int, Plan], dict[str, Tensor]]] = {
    "every_call": every_call,
    "many_at_once": many_at_once,
    "silent_peer": silent_peer,
    "killed": _lose_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL), in_world=True),
    "killed_in_collective": killed_in_collective,
    "stopped": _lose_rank_1(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "exited": _lose_rank_1(lambda: sys.exit(3)),
    "failed": _lose_rank_1(_fail),
}


def main() -> None:
    scenario, plan_path, output = sys.argv[1:]
    plan: Plan = pickle.loads(Path(plan_path).read_bytes())
    try:
        with distributed_session(plan, torch.device("cpu")) as (transport, world_rank):
            result = SCENARIOS[scenario](transport, world_rank, plan)
            torch.save(result, f"{output}.{world_rank}")
    except BaseException as error:
        end_process(FailureReport.of(error))


if __name__ == "__main__":
    main()
