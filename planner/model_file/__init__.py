"""The user's model file: loads it, checks its contract, and identifies the model it builds.

A model file defines `build_model` and `example_batch`, and may define `loss_fn`,
`build_optimizer`, `build_scheduler`, `build_dataset` and `layers`. This package knows names and
signatures. It does not know how a model is traced, planned or run.
"""

from planner.model_file.contract import ModelFile, model_from_functions
from planner.model_file.identity import fingerprint, forward_keys
from planner.model_file.load import load_model_file
from planner.model_file.user_code import build_on_meta, raised_at

__all__ = [
    "ModelFile",
    "build_on_meta",
    "fingerprint",
    "forward_keys",
    "load_model_file",
    "model_from_functions",
    "raised_at",
]
