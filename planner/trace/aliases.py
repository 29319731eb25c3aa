"""Which nodes look at the same memory, and which of them an in-place change has outdated.

It knows nodes and storages. It does not know statements.
"""

import torch
from torch import fx

from planner.errors import TraceError

__all__ = ["Aliases"]


class Aliases:
    """Book-keeping of in-place changes in the glue."""

    def __init__(self) -> None:
        self._owners: dict[int, str] = {}
        """Storage -> what it is, where the glue must not change it."""
        self._nodes: dict[int, list[fx.Node]] = {}
        """Storage -> nodes that hold a tensor on it."""
        self.changed_by: dict[fx.Node, str] = {}
        """Node -> statement that has changed its memory since it was last named."""

    def remember(self, node: fx.Node, owner: str = "") -> None:
        """Note what memory the node's tensor looks at, and whose it is."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()._cdata
            self._nodes.setdefault(storage, []).append(node)
            if owner:
                self._owners[storage] = owner

    def change(self, node: fx.Node, name: str, tensor: torch.Tensor, where: str) -> None:
        """Note that the node, called `name`, changes the tensor in place.

        Raises:
            TraceError: the tensor is the batch's, a parameter or a buffer.
        """
        storage = tensor.untyped_storage()._cdata
        if storage in self._owners:
            raise TraceError(
                f"{where} changes {self._owners[storage]} in place",
                hint="write it without the in-place operation (x = x + 1, not x += 1)",
            )
        for alias in self._nodes.get(storage, []):
            if alias is not node:
                self.changed_by[alias] = name
