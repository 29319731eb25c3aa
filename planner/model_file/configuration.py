"""A transformers configuration (JSON) as a model file: a causal language model, without Python.

It knows the names by which the transformers library builds models, and what a causal language model
is trained on. The library is imported when a configuration is loaded, not before.
"""

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.errors import ModelFileError, UsageError
from planner.model_file.contract import ModelFile

__all__ = ["DEFAULT_SEQUENCE_LENGTH", "is_configuration", "load_configuration"]

DEFAULT_SEQUENCE_LENGTH = 2048
"""Tokens per sample where the user names no number and the model has that many positions."""
_WRITE_PYTHON = "write a model file in Python (docs/model-file.md)"


def is_configuration(path: str) -> bool:
    """Whether the path is that of a transformers configuration rather than of a Python file."""
    return path.endswith(".json")


def load_configuration(path: str, sequence_length: int | None = None) -> ModelFile:
    """The model file that stands for `AutoModelForCausalLM.from_config` of a config.json.

    The batch is `input_ids` and `labels` of `sequence_length` tokens per sample
    (DEFAULT_SEQUENCE_LENGTH, or the model's positions where it has fewer), and the loss is the
    model's own: over tokens moved by one. Weights are random, of the configuration's dtype.

    Raises:
        ModelFileError: the file is missing or is no configuration of a causal language model that
            transformers knows, or transformers is not installed.
        UsageError: `sequence_length` is more than the model's positions.
    """
    fields = _read(path)
    transformers = _import_transformers(path)
    config = _config(transformers, fields, path)
    _check_causal(transformers, config, path)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = _checked_length(sequence_length, positions, path)

    def build_model() -> nn.Module:
        # Configurations are changed by the models that they build.
        fresh = _config(transformers, fields, path)
        fresh.get_text_config().use_cache = False
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(fresh)
        return model

    def example_batch(batch_size: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(text.vocab_size, (batch_size, length))
        return {"input_ids": tokens, "labels": tokens.clone()}

    name = Path(path).stem
    return ModelFile(name=name, path=path, build_model=build_model, example_batch=example_batch)


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        names = [found.name for found in file.parent.glob("*.json")]
        close = difflib.get_close_matches(file.name, names, n=1, cutoff=0.7)
        hint = f"did you mean {file.parent / close[0]}?" if close else "give the path of a file"
        raise ModelFileError(f"there is no configuration {path!r}", hint=hint)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} is not valid JSON: {error}",
            hint="give the config.json of a transformers model",
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        what = f"has {', '.join(fields)[:80] or 'no keys'}" if isinstance(fields, dict) else (
            f"holds a {type(fields).__name__}"
        )  # fmt: skip
        raise ModelFileError(
            f"{path} is no transformers configuration: it {what}, but no model_type",
            hint='give the config.json of a transformers model: it has "model_type": "llama", '
            "or another",
        )
    return fields


def _import_transformers(path: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelFileError(
            f"{path} is a transformers configuration, but transformers cannot be imported: {error}",
            hint="install it: pip install 'lga-plan[hf]'",
        ) from None


def _config(transformers: Any, fields: dict[str, Any], path: str) -> Any:
    known = transformers.CONFIG_MAPPING
    model_type = fields["model_type"]
    if model_type not in known:
        close = difflib.get_close_matches(model_type, list(known), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ModelFileError(
            f"{path}: transformers {transformers.__version__} knows no model_type {model_type!r}",
            hint=f"{hint}For a model with code of its own, {_WRITE_PYTHON}",
        )
    try:
        return known[model_type].from_dict(dict(fields))
    except Exception as error:
        raise ModelFileError(
            f"{path}: transformers refuses it as a configuration of {model_type}: "
            f"{type(error).__name__}: {error}",
            hint="correct the values that it names",
        ) from None


def _check_causal(transformers: Any, config: Any, path: str) -> None:
    """Refuse what is trained on other things than the next token."""
    named = list(getattr(config, "architectures", None) or ())
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    causal = model_class.__name__ if model_class is not None else ""
    if not causal or config.is_encoder_decoder or (named and causal not in named):
        what = f" (architectures: {', '.join(named)})" if named else ""
        raise ModelFileError(
            f"{path} is of model_type {config.model_type!r}{what}, which is no causal language "
            "model",
            hint=f"{_WRITE_PYTHON}, with the batch that it is trained on",
        )


def _checked_length(sequence_length: int | None, positions: int | None, path: str) -> int:
    if sequence_length is None:
        return min(DEFAULT_SEQUENCE_LENGTH, positions or DEFAULT_SEQUENCE_LENGTH)
    if sequence_length < 1:
        raise UsageError(f"--sequence-length is {sequence_length}", hint="give at least one token")
    if positions is not None and sequence_length > positions:
        raise UsageError(
            f"--sequence-length is {sequence_length}, but the model of {path} has {positions} "
            "positions (max_position_embeddings)",
            hint=f"give at most {positions}",
        )
    return sequence_length
