"""Which modules of a model stay whole: the leaves of its trace.

Elements of containers (ModuleList, ModuleDict, Sequential, modules without a forward) stay whole,
and so does every module that contains no container. What contains one is glue, and is traced
through. This module knows module trees only.
"""

from collections.abc import Iterator

from torch import nn

__all__ = ["choose_leaves", "descend", "expose"]


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


def expose(model: nn.Module, leaves: tuple[str, ...], inner: str) -> tuple[str, ...]:
    """Leaves cut finer so that `inner`, a module inside one of them, is a leaf.

    Leaves of the same class are cut alike. Returns the same leaves where `inner` is inside none.
    """
    owner = next((path for path in leaves if inner.startswith(f"{path}.")), None)
    if owner is None:
        return leaves
    names = inner.removeprefix(f"{owner}.").split(".")
    alike = type(model.get_submodule(owner))
    found: list[str] = []
    for path in leaves:
        found += _cut(path, model.get_submodule(path), names, alike)
    return tuple(dict.fromkeys(found))


def _cut(path: str, module: nn.Module, names: list[str], alike: type | None) -> Iterator[str]:
    """Leaves below the module down to the one that `names` lead to; itself if they lead nowhere."""
    children = dict(module.named_children())
    if not names or names[0] not in children or (alike and type(module) is not alike):
        yield from _walk(path, module) if _is_container(module) else (path,)
        return
    for name, child in children.items():
        yield from _cut(f"{path}.{name}", child, names[1:] if name == names[0] else [], None)


def _walk(path: str, module: nn.Module) -> Iterator[str]:
    is_container = _is_container(module)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_container(child):
            yield from _walk(child_path, child)
        elif is_container or not any(_is_container(inner) for inner in child.modules()):
            yield child_path
        else:
            yield from _walk(child_path, child)


def _is_container(module: nn.Module) -> bool:
    # A subclass of Sequential may have a forward of its own, and be a layer.
    has_forward = type(module).forward is not nn.Module.forward
    has_children = next(module.children(), None) is not None
    return type(module) is nn.Sequential or (has_children and not has_forward)


def _forward_is_python(module: nn.Module) -> bool:
    # torch's own modules (attention, recurrent) read their children's weights directly.
    return not type(module).__module__.startswith("torch.nn.modules.") or _is_container(module)
