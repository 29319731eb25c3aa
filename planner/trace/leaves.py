"""Which modules of a model stay whole: the leaves of its trace.

Elements of ModuleLists and Sequentials stay whole, and so does every module that contains no such
list. What contains a list is glue, and is traced through. This module knows module trees only.
"""

from collections.abc import Iterator

from torch import nn

__all__ = ["choose_leaves", "descend"]


def choose_leaves(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules to keep whole; never the model itself."""
    return tuple(_walk("", model))


def descend(model: nn.Module, leaves: tuple[str, ...]) -> tuple[str, ...]:
    """Leaves one level finer: each one that has children is replaced by its own leaves.

    Returns the same leaves where nothing can be cut finer.
    """
    found: list[str] = []
    for path in leaves:
        module = model.get_submodule(path)
        inner = tuple(_walk(path, module))
        found += inner if inner and _forward_is_python(module) else (path,)
    return tuple(dict.fromkeys(found))


def _walk(path: str, module: nn.Module) -> Iterator[str]:
    is_list = _is_list(module)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_list(child):
            yield from _walk(child_path, child)
        elif is_list or not any(_is_list(inner) for inner in child.modules()):
            yield child_path
        else:
            yield from _walk(child_path, child)


def _is_list(module: nn.Module) -> bool:
    # Exactly these: a subclass has a forward of its own and may be a layer.
    return type(module) in (nn.ModuleList, nn.Sequential)


def _forward_is_python(module: nn.Module) -> bool:
    # torch's own modules (attention, recurrent) read their children's weights directly.
    return not type(module).__module__.startswith("torch.nn.modules.") or _is_list(module)
