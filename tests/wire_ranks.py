"""What leaves a rank in one step of each of several plans, counted at the process groups.

As a program (`python tests/wire_ranks.py _ PLANS OUTPUT`) it is one gloo rank; PLANS is a pickled
list of Plans and {plan's place: {kind: bytes}} goes to OUTPUT.<rank>. It knows torch's process
groups, and nothing of what a plan should send.
"""

import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.model_file import model_from_functions
from planner.plan.types import Plan
from runtime.build import make_executor
from runtime.failure import FailureReport, end_process
from runtime.session import distributed_session
from runtime.transfer import DistributedTransport

__all__ = ["MODEL"]

CPU = torch.device("cpu")
KINDS = {"pair": "SEND", "gather": "GATHER", "reduce": "REDUCE", "share": "REDUCE",
         "tied": "REDUCE_TIED"}  # fmt: skip
"""Instruction that a group works for, by the first word of the group's description."""
OTHER_CALLS = (
    "_allgather_base", "_reduce_scatter_base", "allgather", "allreduce", "alltoall",
    "alltoall_base", "broadcast", "gather", "reduce", "reduce_scatter", "scatter",
)  # fmt: skip


class Tied(nn.Module):
    """The first layer and the last have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.layers[4].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 8)}


def _loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()


MODEL = model_from_functions(Tied, _batch, loss_fn=_loss)


def _count_into(found: Counter[str]) -> None:
    """Messages through any process group from now on; every other call is an error."""
    send = dist.ProcessGroup.send

    def counting(group: dist.ProcessGroup, tensors: list[Tensor], *place: int) -> Any:
        found[KINDS[group.group_desc.split()[0]]] += sum(tensor.nbytes for tensor in tensors)
        return send(group, tensors, *place)

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} sends bytes that nobody counts")

        return refuse

    dist.ProcessGroup.send = counting  # type: ignore[method-assign, assignment]
    for name in OTHER_CALLS:
        setattr(dist.ProcessGroup, name, refusing(name))


def main() -> None:
    _, plans_path, output = sys.argv[1:]
    plans: list[Plan] = pickle.loads(Path(plans_path).read_bytes())
    try:
        with distributed_session(plans[0], CPU) as (first, world_rank):
            more = [DistributedTransport(plan, world_rank, CPU) for plan in plans[1:]]
            found: dict[int, dict[str, int]] = {}
            counts: Counter[str] = Counter()
            _count_into(counts)
            for place, (plan, transport) in enumerate(zip(plans, [first, *more], strict=True)):
                executor = make_executor(plan, MODEL, transport, world_rank, CPU)
                counts.clear()
                executor.step(_batch(plan.replica_batch_size))
                found[place] = dict(counts)
                executor.close()
            torch.save(found, f"{output}.{world_rank}")
    except BaseException as error:
        end_process(FailureReport.of(error))


if __name__ == "__main__":
    main()
