"""Who may import whom, and whether `__all__` says what is public."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import planner
import runtime

ROOT = Path(__file__).resolve().parent.parent
LEVELS: tuple[tuple[str, ...], ...] = (
    ("planner.errors",),
    (
        "planner.files",
        "planner.heap",
        "planner.layouts",
        "planner.operators",
        "planner.partitions",
        "planner.passages",
        "planner.schedules",
        "planner.storages",
        "planner.words",
    ),
    ("planner.plan.code",),
    ("planner.graph",),
    ("planner.precision",),
    ("planner.compute_type",),
    ("planner.profile",),
    ("planner.cluster.types",),
    ("planner.timeline",),
    ("planner.solve.types",),
    ("planner.plan",),
    ("planner.model_file",),
    ("planner.trace",),
    ("planner.measure",),
    ("planner.cluster",),
    ("planner.cost",),
    ("planner.calibrate",),
    ("planner.solve",),
    ("planner.schedule",),
    ("planner.lower",),
    ("planner.simulate",),
    ("planner.check",),
    ("planner.order",),
    ("planner.predict",),
    ("planner.export",),
    ("planner.apply_profile",),
    ("planner.host_memory",),
    ("planner.explain.order_time", "planner.explain.demands", "planner.explain.types"),
    ("planner.explain.order_model",),
    ("planner.explain.candidates",),
    ("planner.explain.alternating",),
    ("planner.variants",),
    ("planner.any_schedule",),
    ("planner.explain",),
    ("planner.best_schedule",),
    ("planner.prepare",),
    ("planner.pipeline",),
    ("planner.entry",),
    ("planner.batch",),
    ("planner.report",),
    ("planner.console",),
    ("planner.cli",),
)
"""Earlier may be imported by later; a name covers the modules below it that have no own level.

The `types` of cluster and solve are data that a plan or an order is made of: they come early. So
does the search that the choice of a schedule and the explanation of one share.
"""
RUNTIME_MAY_IMPORT = (
    "planner.cluster.accelerator",
    "planner.cluster.measure",
    "planner.cluster.measured",
    "planner.cluster.samples",
    "planner.cluster.schema",
    "planner.cluster.types",
    "planner.compute_type",
    "planner.console",
    "planner.cost.algorithm",
    "planner.errors",
    "planner.export.timeline_file",
    "planner.files",
    "planner.graph",
    "planner.heap",
    "planner.layouts",
    "planner.model_file",
    "planner.operators",
    "planner.passages",
    "planner.plan",
    "planner.precision",
    "planner.report.measured_cluster",
    "planner.report.quantities",
    "planner.schedules",
    "planner.storages",
    "planner.timeline",
)
"""Those of cluster, cost and report are for the program that measures clusters."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import of `planner` or `runtime`, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if is_package else module.rpartition(".")[0]
                base = importlib.util.resolve_name("." * node.level + base, package)
            names = [
                name if is_module(name := f"{base}.{alias.name}") else base for alias in node.names
            ]
        for name in names:
            if name.split(".")[0] in ("planner", "runtime"):
                yield node.lineno, name


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def level(name: str) -> int:
    """Index of the longest name of LEVELS that covers the module; -1 where none does."""
    found = [
        (len(prefix), index)
        for index, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if covers(prefix, name)
    ]
    return max(found, default=(0, -1))[1]


def planner_fault(module: str, imported: str) -> str:
    """Why this import breaks the order of levels, or nothing."""
    if covers("runtime", imported):
        return "the planner does not know the runtime"
    if level(imported) < 0:
        return "it is the package itself, not one of its levels"
    if level(imported) > level(module):
        return "it belongs to a later level"
    same_level = level(imported) == level(module)
    own_prefix = any(covers(p, module) and covers(p, imported) for p in LEVELS[level(module)])
    return "" if not same_level or own_prefix else "it is another module of the same level"


def runtime_fault(imported: str) -> str:
    allowed = covers("runtime", imported) or any(covers(p, imported) for p in RUNTIME_MAY_IMPORT)
    return "" if allowed else "the runtime reads only the plan's types and errors"


def faults(path: Path) -> list[str]:
    module = module_name(path)
    found = []
    for line, imported in imports(path.read_text(), module, path.name == "__init__.py"):
        is_runtime = covers("runtime", module)
        why = runtime_fault(imported) if is_runtime else planner_fault(module, imported)
        if why:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {imported}: {why}")
    return found


def planner_files() -> list[Path]:
    return [path for path in files("planner") if path != ROOT / "planner" / "__init__.py"]


def test_there_is_something_to_check() -> None:
    assert len(planner_files()) > 10
    assert len(files("runtime")) > 1


def test_every_planner_module_has_a_level() -> None:
    names = [module_name(path) for path in planner_files()]
    assert [name for name in names if level(name) < 0] == []


def test_planner_imports_only_earlier_levels() -> None:
    assert [fault for path in planner_files() for fault in faults(path)] == []


def test_package_front_does_not_know_the_runtime() -> None:
    source = (ROOT / "planner" / "__init__.py").read_text()
    names = [name for _, name in imports(source, "planner", True)]
    assert [name for name in names if covers("runtime", name)] == []


def test_runtime_imports_only_what_a_plan_is() -> None:
    assert [fault for path in files("runtime") for fault in faults(path)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("planner.graph", "from planner.solve import types"),
        ("planner.graph", "def late():\n    import planner.cli"),
        ("planner.errors", "from planner.operators import RANDOM"),
        ("planner.profile", "from planner.timeline import Timeline"),
        ("planner.schedule.order", "from planner.lower import lower"),
        ("planner.plan.types", "from ..trace import trace"),
        ("planner.cost.memory", "import planner"),
        ("planner.plan.types", "from planner.cluster import resolve"),
        ("planner.check.rules", "from runtime.transport import Pending"),
    ],
)
def test_a_wrong_planner_import_is_found(module: str, source: str) -> None:
    assert [n for _, n in imports(source, module, False) if planner_fault(module, n)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("planner.schedule.order", "from planner.solve.types import Placement"),
        ("planner.lower.program", "from .units import Unit"),
        ("planner.graph", "from planner.plan.code import Statement"),
        ("planner.cli.plan", "from planner import errors"),
        ("planner.cost.memory", "import torch"),
    ],
)
def test_a_right_planner_import_passes(module: str, source: str) -> None:
    assert not [n for _, n in imports(source, module, False) if planner_fault(module, n)]


@pytest.mark.parametrize("name", ["planner", "planner.solve.types", "planner.cluster", "planner.x"])
def test_a_wrong_runtime_import_is_found(name: str) -> None:
    assert runtime_fault(name)


def modules() -> list[str]:
    """Every module that can be imported without running a program, packages excluded."""
    return [
        found.name
        for package in (planner, runtime)
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not found.ispkg and not found.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", modules())
def test_all_is_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        pytest.skip("defines no __all__")
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []
    assert len(set(module.__all__)) == len(module.__all__)
    public = {
        key
        for key, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
        and not key.startswith("_")
    }
    assert public - set(module.__all__) == set()
