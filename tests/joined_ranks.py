"""One rank of test_joined.py: trains inside a process group of its own making, or of connect's.

    joined_ranks.py HOW PLAN OUTPUT

HOW is `connect` (which makes the group), `env`, or the path of a file to meet at.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from stepping import batches, linears

import runtime
from planner.plan.file import read_plan


def join(how: str) -> None:
    if how == "connect":
        return
    if how == "env":
        dist.init_process_group("gloo")
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # whoever meets in a file need not have them
    dist.init_process_group("gloo", init_method=f"file://{how}", rank=rank, world_size=world_size)


def main() -> None:
    how, plan_path, output = sys.argv[1:]
    join(how)
    plan, model_file = read_plan(plan_path), linears()
    losses: list[float] = []
    for session in range(2):
        time.sleep(session * int(os.environ.get("LOCAL_RANK", "0")))  # rank 1 comes late again
        with runtime.connect(plan, model_file.build_model, loss_fn=model_file.loss_fn) as executor:
            for step in range(2):
                given = batches(plan, model_file, step)[executor.replica]
                losses.append(executor.mean_loss(executor.step(given)))
            world_rank = executor.world_rank
    assert dist.is_initialized() == (how != "connect")
    if dist.is_initialized():
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == plan.world_size
        dist.destroy_process_group()
    torch.save(losses, f"{output}.{world_rank}")


if __name__ == "__main__":
    main()
