"""Writes the folder of a checkpoint: every rank its own part, and only whole folders have a name.

Tensors are written by torch.distributed.checkpoint, so any program that reads that reads them, in
whatever layout. A folder is written under another name and renamed when every rank has written its
part; `.metadata`, which torch's reader looks for first, is written last. So a run that ends in the
middle leaves nothing that is taken for a checkpoint.

This module knows names, boxes and files. It does not know what trains.
"""

import io
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from planner.errors import UsageError
from runtime.checkpoint.figures import FIGURES
from runtime.checkpoint.parts import Key, Part

__all__ = ["Gather", "write_checkpoint"]

Gather = Callable[[Any], list[Any]]
"""My value -> every rank's, by rank."""


def write_checkpoint(
    folder: Path,
    parts: Sequence[Part],
    figures: Mapping[str, Any],
    aliases: Mapping[str, Key],
    *,
    rank: int,
    gather: Gather,
) -> None:
    """Write every rank's parts to one folder; all ranks call it together.

    Args:
        folder: replaced as a whole if it is there.
        parts: of this rank. A box that several ranks have is written by one of them.
        figures: plain values, of rank 0.
        aliases: further names of tensors: name -> the key they are written under.
        rank: world rank.
        gather: collects small objects of all ranks.

    Raises:
        UsageError: it cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    trouble = ""
    if rank == 0:
        trouble = _attempt(lambda: _prepare(aside, figures), folder)
    _agree(trouble, gather)
    planner = _SavePlanner(parts, aliases)
    writer = _Writer(aside)
    writer.set_up_storage_writer(is_coordinator=rank == 0)
    plans, metadata = planner.create_global_plan(gather(planner.create_local_plan()))
    plan = writer.prepare_global_plan(plans)[rank]
    results: list[WriteResult] = []
    trouble = _attempt(lambda: results.extend(writer.write_data(plan, planner).wait()), folder)
    of_ranks = gather((trouble, results))
    _raise(found for found, _ in of_ranks)
    if rank == 0:
        trouble = _attempt(
            lambda: _finish(writer, metadata, [found for _, found in of_ranks], aside, folder),
            folder,
        )
    _agree(trouble, gather)


def _prepare(aside: Path, figures: Mapping[str, Any]) -> None:
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    content = io.BytesIO()
    torch.save(dict(figures), content)
    content.seek(0)
    try:
        torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).split("GLOBAL ")[-1].split(" was not")[0]
        raise UsageError(
            "the optimizer or scheduler keeps what a checkpoint cannot hold safely "
            f"({what}): only tensors and plain values can be read again",
            hint="keep numbers, texts, lists and dicts in parameter groups and schedulers",
        ) from None
    (aside / FIGURES).write_bytes(content.getvalue())


def _finish(
    writer: "_Writer",
    metadata: Metadata,
    results: list[list[WriteResult]],
    aside: Path,
    folder: Path,
) -> None:
    writer.finish(metadata, results)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _attempt(action: Callable[[], object], folder: Path) -> str:
    """What stood in the way, empty if nothing: the other ranks must hear of it."""
    try:
        action()
    except UsageError as error:
        return error.message
    except OSError as error:
        return f"cannot write the checkpoint {folder}: {error.strerror or error}"
    return ""


def _agree(trouble: str, gather: Gather) -> None:
    """All ranks go on, or none."""
    _raise(gather(trouble))


def _raise(troubles: Iterable[str]) -> None:
    for trouble in filter(None, troubles):
        raise UsageError(trouble, hint="give another path, or make room")


class _SavePlanner(DefaultSavePlanner):
    """Torch's own, for parts instead of a state_dict."""

    def __init__(self, parts: Sequence[Part], aliases: Mapping[str, Key]) -> None:
        super().__init__()
        self._boxes = {
            MetadataIndex(part.name, box.offsets): (part, box)
            for part in parts
            for box in part.boxes()
        }
        self._aliases = dict(aliases)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
                    properties=TensorProperties(dtype=box.values.dtype),
                    size=torch.Size(part.shape),
                ),
            )
            for index, (part, box) in self._boxes.items()
        ]
        # Where each name came from: tools that turn a checkpoint into nested dicts ask for it.
        keys: dict[str, Key] = {part.name: part.key for part, _ in self._boxes.values()}
        return SavePlan(items, planner_data=keys)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for alias, key in self._aliases.items():
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[".".join(key)]
            metadata.planner_data[alias] = (key[0], alias.removeprefix(f"{key[0]}."))
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._boxes[write_item.index][1].values


class _Writer(FileSystemWriter):
    """Torch's own; names of one tensor share its bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result for found in results for result in found}
        of_tensor: dict[int, str] = {}
        shared = []
        for name, tensor in metadata.state_dict_metadata.items():
            written = of_tensor.setdefault(id(tensor), name)
            if written != name:
                shared += [
                    WriteResult(
                        index=MetadataIndex(name, index.offset, index.index),
                        size_in_bytes=result.size_in_bytes,
                        storage_data=result.storage_data,
                    )
                    for index, result in places.items()
                    if index.fqn == written
                ]
        super().finish(metadata, [*results, shared])
