"""The user's model file: loads it, checks its contract, and identifies the model it builds.

A model file defines `build_model` and `example_batch`, and may define `loss_fn`,
`build_optimizer`, `build_scheduler`, `build_dataset` and `layers`. The config.json of a causal
language model of the transformers library stands for one. This package knows names and
signatures. It does not know how a model is traced, planned or run.
"""

from planner.model_file.configuration import DEFAULT_SEQUENCE_LENGTH, is_configuration
from planner.model_file.contract import ModelFile, model_from_functions
from planner.model_file.identity import fingerprint, forward_keys
from planner.model_file.load import load_model_file
from planner.model_file.user_code import build_on_meta, raised_at, recorded_at

__all__ = [
    "DEFAULT_SEQUENCE_LENGTH",
    "ModelFile",
    "build_on_meta",
    "fingerprint",
    "forward_keys",
    "is_configuration",
    "load_model_file",
    "model_from_functions",
    "raised_at",
    "recorded_at",
]
