"""Reads the tensors of a checkpoint. Nothing that is read can run code: pickles are restricted.

This module knows names, boxes and files. It does not know what trains.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from planner.errors import UsageError
from runtime.checkpoint.figures import METADATA, damaged
from runtime.checkpoint.parts import Part

__all__ = ["CheckpointReader"]

_DESCRIPTIONS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}  # fmt: skip
"""What the metadata of a checkpoint is made of."""


class CheckpointReader:
    """Fills parts from a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UsageError: it is missing or damaged.
        """
        self._folder = folder
        self._reader = _Reader(folder)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)
        except Exception as error:  # whatever damaged bytes make pickle do
            raise damaged(folder, error) from None
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Shape and dtype of every tensor, by name."""

    def fill(self, parts: Sequence[Part]) -> None:
        """Read what the checkpoint holds of these elements, in their own dtypes.

        Raises:
            UsageError: a tensor is missing, of another shape, or damaged.
        """
        planner = _LoadPlanner()
        items: list[ReadItem] = []
        for part in parts:
            saved = self.tensors.get(part.name)
            if saved is None:
                raise damaged(self._folder, KeyError(f"it has no {part.name}"))
            if tuple(saved.size) != tuple(part.shape):
                raise UsageError(
                    f"{part.name} has shape {tuple(saved.size)} in the checkpoint {self._folder}, "
                    f"but {tuple(part.shape)} here",
                    hint="give a checkpoint of this model",
                )
            items += planner.items(part, saved)
        try:
            self._reader.read_data(LoadPlan(items), planner)
        except Exception as error:
            raise damaged(self._folder, error) from None


class _LoadPlanner(DefaultLoadPlanner):
    """Hands torch's reader the places to fill."""

    def __init__(self) -> None:
        super().__init__()
        self._boxes: dict[MetadataIndex, Tensor] = {}

    def items(self, part: Part, saved: TensorStorageMetadata) -> list[ReadItem]:
        boxes = part.boxes()
        self._boxes |= {MetadataIndex(part.name, box.offsets): box.values for box in boxes}
        chunks = [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes
        ]
        return create_read_items_for_chunk_list(part.name, saved, chunks)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._boxes[read_item.dest_index]
        for dim, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, first, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Filled in place."""


class _Reader(FileSystemReader):
    """Torch's own, which unpickles nothing but torch's own descriptions of tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA} is of another program")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if of_torch or (module, name) in _DESCRIPTIONS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}")
