"""A whole training state in a folder: saved by the ranks of one plan, taken up by those of any.

The state is parameters, buffers, optimizer and scheduler state, the number of steps, the seed, the
scales of loss and gradient, and the caller's position in the data. Another plan of the same model
goes on from it: bitwise where the arithmetic is the same. This module knows what belongs to a
training state. It does not know how tensors are cut or written.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.errors import FingerprintError, UsageError
from runtime.checkpoint.figures import find_checkpoint, read_figures
from runtime.checkpoint.parts import Key
from runtime.checkpoint.rank import figures_of, fill_rank, parts_of, put_figures
from runtime.gathering import gather_objects
from runtime.loss_scale import LossScale
from runtime.state import RankState

__all__ = ["CheckpointInfo", "load_training", "read_info", "save_training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of the run that wrote it."""

    path: Path
    model_name: str
    fingerprint: str
    """Of the model: any plan of it can take the checkpoint up."""
    num_steps: int
    """Steps taken before it."""
    seed: int
    global_batch_size: int
    """Samples in each of those steps."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that the caller gave: where the data goes on."""


def save_training(
    rank: RankState,
    model: torch.nn.Module,
    buffers: Mapping[str, Tensor],
    folder: Path,
    data: Mapping[str, Any],
) -> None:
    """All ranks together write what each holds.

    Args:
        rank: this rank's state, between two steps.
        model: the user's, which knows the names of tied parameters.
        buffers: saved buffers of this rank's modules.
        folder: replaced if it is a checkpoint.
        data: the caller's plain values.

    Raises:
        UsageError: the folder cannot be written, or holds something else.
        RunError: a rank was lost.
    """
    from runtime.checkpoint.write import write_checkpoint  # torch's part takes a second to import

    plan = rank.plan
    here = plan.world_rank(rank.rank, rank.replica)

    def gather(value: Any) -> list[Any]:
        return gather_objects(
            rank.transport, value, here, plan.world_size, rank.device, "a checkpoint"
        )

    figures: dict[str, Any] = {"settings": {}, "numbers": {}, "scheduler": None}
    for found in gather(figures_of(rank)):
        figures["settings"] |= found["settings"]
        figures["numbers"] |= found["numbers"]
        figures["scheduler"] = figures["scheduler"] or found["scheduler"]
    figures |= {
        "model_name": plan.model_name,
        "fingerprint": plan.fingerprint,
        "num_steps": rank.step,
        "seed": plan.options.seed,
        "global_batch_size": plan.global_batch_size,
        "data": dict(data),
        "loss_scale": None if rank.loss_scale is None else asdict(rank.loss_scale),
        "clip_scale": float(rank.buffers["clip:scale"]) if plan.options.clip_delayed else None,
    }
    _refuse_others(folder)
    parts, aliases = parts_of(rank, buffers), _aliases(rank, model)
    write_checkpoint(folder, parts, figures, aliases, rank=here, gather=gather)


def load_training(rank: RankState, buffers: Mapping[str, Tensor], path: Path) -> CheckpointInfo:
    """This rank takes up its part; every rank must call it, but none waits for another.

    Args:
        rank: this rank's state, between two steps.
        buffers: saved buffers of this rank's modules, to be filled in place.
        path: a checkpoint, or a folder of checkpoints, of which the last is taken.

    Raises:
        UsageError: there is no whole checkpoint, or it is of another seed.
        FingerprintError: it is of another model.
    """
    from runtime.checkpoint.read import CheckpointReader  # torch's part takes a second to import

    info, plan = read_info(path), rank.plan
    if info.fingerprint != plan.fingerprint:
        raise FingerprintError(
            f"{info.path} is of another model ({info.model_name}, fingerprint "
            f"{info.fingerprint[:12]}) than the plan's ({plan.model_name}, fingerprint "
            f"{plan.fingerprint[:12]})",
            hint="give a checkpoint of this model",
        )
    if info.seed != plan.options.seed:
        raise UsageError(
            f"{info.path} is of a run with seed {info.seed}, but the plan's is {plan.options.seed}",
            hint=f"take that seed: replace(plan, options=replace(plan.options, seed={info.seed}))",
        )
    fill_rank(rank, CheckpointReader(info.path), buffers)
    figures = read_figures(info.path)
    put_figures(rank, figures)
    if rank.loss_scale is not None and figures["loss_scale"] is not None:
        rank.loss_scale = LossScale(**figures["loss_scale"])
    if plan.options.clip_delayed and figures["clip_scale"] is not None:
        rank.buffers["clip:scale"].fill_(figures["clip_scale"])
    rank.step = info.num_steps
    return info


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says of itself; of a folder of checkpoints, the last one.

    Raises:
        UsageError: there is no whole checkpoint.
    """
    folder = find_checkpoint(path)
    figures = read_figures(folder)
    names = ("model_name", "fingerprint", "num_steps", "seed", "global_batch_size", "data")
    return CheckpointInfo(path=folder, **{name: figures[name] for name in names})


def _refuse_others(folder: Path) -> None:
    """A folder of something else is not replaced."""
    if folder.exists():
        try:
            read_figures(folder)
        except UsageError:
            raise UsageError(
                f"{folder} is there already, and is no checkpoint", hint="give another path"
            ) from None


def _aliases(rank: RankState, model: torch.nn.Module) -> dict[str, Key]:
    """Further names of tied parameters, as the model's own state_dict has them."""
    planned = {name for unit in rank.plan.units for name in unit.parameters}
    first = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)
             if name in planned}  # fmt: skip
    return {
        f"model.{name}": ("model", first[id(p)])
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in planned and id(p) in first
    }
