"""The plan, the model and the machine that a run is given, read and compared."""

from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from planner.errors import FingerprintError, ModelFileError, UsageError
from planner.model_file import (
    ModelFile,
    build_on_meta,
    fingerprint,
    is_configuration,
    load_model_file,
)
from planner.plan.file import read_plan
from planner.plan.types import Plan

__all__ = ["CheckedDataset", "check_batch", "check_machine", "load_inputs", "replica_part"]


def load_inputs(plan_path: Path, model_path: str) -> tuple[Plan, ModelFile]:
    """Read both, and make sure that they belong together.

    The items of the model file's dataset are compared with the plan when they are read.

    Raises:
        PlanFileError: the plan is missing or damaged.
        ModelFileError: the model file is missing, does not run, or builds no model.
        FingerprintError: the plan was made for another model.
    """
    plan = read_plan(plan_path)
    # A file that builds its layers when it is loaded must draw the same weights on every rank.
    torch.manual_seed(plan.options.seed)
    model_file = load_model_file(model_path)
    found = fingerprint(build_on_meta(model_file.build_model, model_file.name))
    if found != plan.fingerprint:
        raise FingerprintError(
            f"{plan_path} was made for another model ({plan.model_name}, fingerprint "
            f"{plan.fingerprint[:12]}) than {model_path} builds (fingerprint {found[:12]})",
            hint=f"plan again: lga-plan {model_path} --gpus {plan.world_size}",
        )
    if is_configuration(model_path):  # the plan knows how long its samples are
        model_file = load_model_file(model_path, sequence_length=plan.batch[0].shape[1])
    if model_file.build_dataset is not None:
        builder = _checked_builder(model_file.build_dataset, plan)
        model_file = replace(model_file, build_dataset=builder)
    return plan, model_file


def check_machine(plan: Plan, num_ranks: int) -> None:
    """Refuse a plan for GPUs where `num_ranks` processes would not find one each.

    Raises:
        UsageError: too few GPUs here.
    """
    num_gpus = torch.cuda.device_count() if plan.backend == "nccl" else num_ranks
    if num_gpus < num_ranks:
        raise UsageError(
            f"the plan is for GPUs (cluster {plan.cluster.name}, backend nccl) and would run "
            f"{num_ranks} ranks on this machine, which has {num_gpus or 'no'} GPUs for torch",
            hint=f"plan for processes of this machine: lga-plan ... --gpus {plan.world_size} "
            "--cluster cpu",
        )


def replica_part(plan: Plan, replica: int, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """This replica's samples of a batch of all replicas'; any other batch as it is."""
    if plan.num_replicas == 1:
        return batch
    size = plan.replica_batch_size
    sizes = {len(value) for value in batch.values() if value.dim()}
    if sizes != {plan.global_batch_size}:
        return batch
    return {key: value[replica * size : (replica + 1) * size] for key, value in batch.items()}


def check_batch(plan: Plan, batch: Mapping[str, Tensor]) -> None:
    """Refuse a batch that is not one replica's for one step of the plan.

    Raises:
        UsageError: a key is missing, or a tensor has another size or type than the plan's.
    """
    for spec in plan.batch:
        if spec.name not in batch:
            raise UsageError(
                f"the batch has no key {spec.name!r}; it has {', '.join(sorted(batch))}",
                hint="give every key that example_batch gives",
            )
        expected = (plan.replica_batch_size, *spec.shape[1:])
        if tuple(batch[spec.name].shape) != expected:
            raise UsageError(
                f"batch key {spec.name!r} has shape {tuple(batch[spec.name].shape)}, but the "
                f"plan is for {expected}: {plan.num_micro_batches} micro-batches of "
                f"{plan.micro_batch_size} samples per replica",
                hint="give such a batch, or plan again with another --batch-size",
            )
        dtype = str(batch[spec.name].dtype).removeprefix("torch.")
        if dtype != spec.dtype and not _is_cast(plan, spec.dtype, batch[spec.name].dtype):
            raise UsageError(
                f"batch key {spec.name!r} is of {dtype}, but the plan is for {spec.dtype}",
                hint=f"convert it, as example_batch does: batch[{spec.name!r}].to(torch."
                f"{spec.dtype})",
            )


def _checked_builder(build_dataset: Callable[[], Any], plan: Plan) -> Callable[[], Any]:
    def build() -> Any:
        dataset = build_dataset()
        readable = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
        return CheckedDataset(dataset, plan) if readable else dataset

    return build


class CheckedDataset(Dataset[dict[str, Any]]):
    """A map-style dataset whose items are compared with what the plan was made for."""

    def __init__(self, dataset: Any, plan: Plan) -> None:
        self._dataset, self._plan = dataset, plan
        self._specs = {spec.name: (spec.shape[1:], spec.dtype) for spec in plan.batch}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Raises:
            ModelFileError: the item is no dict, lacks a key, or has one of another shape or type.
        """
        item = self._dataset[index]
        if not isinstance(item, dict):
            raise _item_error(index, f"is a {type(item).__name__}, not a dict", self._specs)
        for name, (shape, dtype) in self._specs.items():
            if name not in item:
                has = ", ".join(map(repr, item)) or "nothing"
                raise _item_error(index, f"has no key {name!r}; it has {has}", self._specs)
            tensor = _as_tensor(item[name])
            found = f"a {type(item[name]).__name__}" if tensor is None else _described(tensor)
            expected = f"{dtype} of shape {tuple(shape)}"
            if tensor is not None and _is_cast(self._plan, dtype, tensor.dtype):
                tensor = tensor.to(getattr(torch, dtype))
            if tensor is None or _described(tensor) != expected:
                what = f"holds in {name!r} {found}, but the plan is for {expected}"
                raise _item_error(index, what, self._specs)
        return item


def _is_cast(plan: Plan, wanted: str, found: torch.dtype) -> bool:
    """Whether a floating tensor will be cast to the type that the plan computes in."""
    return found.is_floating_point and wanted == plan.options.precision.compute_dtype


def _as_tensor(value: Any) -> Tensor | None:
    """What torch's default_collate makes a batch from, None of anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float | np.ndarray | np.generic):
        return torch.as_tensor(np.asarray(value))
    return None


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _item_error(index: int, what: str, specs: dict[str, Any]) -> ModelFileError:
    return ModelFileError(
        f"item {index} of build_dataset() {what}",
        hint=f"give a dict with {', '.join(specs)}: tensors as in example_batch, without the "
        "batch dimension",
    )
