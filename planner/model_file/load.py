"""Load a model file by path, as a module or as a configuration, and say why it does not load."""

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from planner.errors import ModelFileError, UsageError
from planner.model_file.configuration import is_configuration, load_configuration
from planner.model_file.contract import ModelFile, check_contract
from planner.model_file.user_code import raised_at

__all__ = ["load_model_file"]


def load_model_file(path_or_module: str, *, sequence_length: int | None = None) -> ModelFile:
    """Load `model.py` (a path), `package.module` (an importable name) or `config.json`.

    `sequence_length`, in tokens, is for the last of them: a transformers configuration.

    Raises:
        ModelFileError: no such file or module, it does not run, or it breaks the contract.
        UsageError: a sequence length for a model file in Python, or one beyond the model's.
    """
    if is_configuration(path_or_module):
        return load_configuration(path_or_module, sequence_length)
    if sequence_length is not None:
        raise UsageError(
            f"--sequence-length is {sequence_length}, but {path_or_module} is no transformers "
            "configuration (config.json)",
            hint="leave it out: example_batch in the model file says how long a sample is",
        )
    if path_or_module.endswith(".py") or Path(path_or_module).exists() or "/" in path_or_module:
        module, name = _load_path(path_or_module), Path(path_or_module).stem
    else:
        module, name = _load_module(path_or_module), path_or_module.rpartition(".")[2]
    return check_contract(module, name, path_or_module)


def _load_path(text: str) -> ModuleType:
    path = Path(text)
    if not path.is_file():
        folder = path.parent
        names = [file.name for file in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
        hint = f"did you mean {folder / close[0]}?" if close else "give the path of a .py file"
        what = (
            f"{text!r} is a folder"
            if text and path.is_dir()
            else f"there is no model file {text!r}"
        )
        raise ModelFileError(what, hint=hint)
    unique = f"lga_model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    loader = importlib.machinery.SourceFileLoader(unique, str(path.absolute()))
    spec = importlib.util.spec_from_file_location(unique, path.absolute(), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    folder_name = str(path.resolve().parent)
    added = folder_name not in sys.path
    if added:
        sys.path.insert(0, folder_name)
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[unique]
        raise _import_error(text, error) from None
    finally:
        if added and folder_name in sys.path:
            sys.path.remove(folder_name)
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelFileError(
            f"{name!r} is neither a .py file nor the name of a module",
            hint="give a path ending in .py, or a module that Python can import from here",
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _import_error(name, error) from None
        raise ModelFileError(
            f"there is no module {name!r}",
            hint="give a path ending in .py, or a module that Python can import from here",
        ) from None
    except BaseException as error:
        raise _import_error(name, error) from None


def _import_error(name: str, error: BaseException) -> BaseException:
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, SyntaxError):
        where = ""
        if error.lineno is not None:
            line = (error.text or "").strip()
            where = f"\n  {error.filename}, line {error.lineno}: {line}"
        return ModelFileError(
            f"{name} is not valid Python: {error.msg}{where}", hint="correct the line"
        )
    return ModelFileError(
        f"{name} raised {type(error).__name__}: {error}{raised_at(error)}",
        hint="make the file run with plain Python first",
    )
