"""A third judge of plans, for tests: it runs a plan in threads and looks at what it computes.

It knows the runtime and numbers. It knows no rules, and shares nothing with checker and oracle.
"""

from dataclasses import replace

import torch
from stepping import batches, on_every_rank
from torch import Tensor
from training import relative_rms

from planner.model_file import ModelFile
from planner.plan.types import Plan
from runtime.executor import Executor
from runtime.result import StepResult
from runtime.shards import UnitState

__all__ = ["Numbers", "difference", "numbers_of"]

Numbers = dict[str, Tensor]
"""Losses, gradients, norms, checkpoints and the state, by a name that says of which rank."""
_DEADLINE_SECONDS = 5.0


def numbers_of(
    plan: Plan, model_file: ModelFile, deadline_seconds: float = _DEADLINE_SECONDS
) -> Numbers:
    """Of two steps with an evaluation between them.

    Raises:
        Exception: what stopped a rank first, such as a wait beyond the deadline.
    """
    plan = replace(plan, options=replace(plan.options, deadline_seconds=deadline_seconds))
    given = [batches(plan, model_file, step) for step in range(3)]

    def run(executor: Executor) -> Numbers:
        found: Numbers = {}
        replica, passes = executor.replica, 0
        where = f"rank {executor.rank}.{replica}"

        def observe(state: UnitState, gradient: Tensor) -> None:
            for piece in state.pieces:
                start = piece.first - state.ranges[piece.name][0]
                name = f"{where} pass {passes} gradient of {piece.name} from {start}"
                assert name not in found, f"{name} is applied twice"
                found[name] = gradient[piece.first - state.first : piece.last - state.first].clone()

        executor.observe(observe)
        for act in (executor.step, executor.evaluate, executor.step):
            found |= _of_result(act(given[passes][replica]), f"{where} pass {passes}")
            passes += 1
        if plan.options.save:
            checkpoint = executor.checkpoint()
            for unit, shard in checkpoint.shards.items():
                found[f"{where} checkpoint of {unit}"] = shard.clone()
            for unit, moments in checkpoint.moments.items():
                for name, slots in moments.items():
                    for slot, value in slots.items():
                        found[f"{where} {slot} of {name} in {unit}"] = torch.as_tensor(value)
        state = executor.state_dict()
        return found | {f"{where} {name}": value for name, value in state.items()}

    parts = on_every_rank(plan, model_file, run)
    return {name: value for part in parts for name, value in part.items()}


def difference(mine: Numbers, wanted: Numbers, tolerance: float = 0.0) -> str:
    """The first number that is missing, too much or another; empty if all are alike."""
    for name in sorted(mine.keys() ^ wanted.keys()):
        return f"{name} is {'lacking' if name in wanted else 'too much'}"
    for name, value in mine.items():
        if torch.equal(value, wanted[name]):
            continue
        gap = relative_rms(value, wanted[name])
        if not gap <= tolerance:
            return f"{name} differs by {gap:.2g}"
    return ""


def _of_result(result: StepResult, where: str) -> Numbers:
    found = {f"{where} loss {m}": loss.clone() for m, loss in enumerate(result.losses)}
    if result.finite is not None:
        found[f"{where} finite"] = torch.tensor(result.finite)
    if result.gradient_norm is not None:
        found[f"{where} norm"] = torch.tensor(result.gradient_norm)
    return found
