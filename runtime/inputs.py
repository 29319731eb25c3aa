"""The plan and the model that a run is given, read and compared."""

from pathlib import Path

import torch

from planner.errors import FingerprintError, ModelFileError
from planner.model_file import ModelFile, fingerprint, load_model_file
from planner.plan.file import read_plan
from planner.plan.types import Plan

__all__ = ["load_inputs"]


def load_inputs(plan_path: Path, model_path: str) -> tuple[Plan, ModelFile]:
    """Read both, and make sure that they belong together.

    Raises:
        PlanFileError: the plan is missing or damaged.
        ModelFileError: the model file is missing, does not run, or builds no model.
        FingerprintError: the plan was made for another model.
    """
    plan = read_plan(plan_path)
    # A file that builds its layers when it is loaded must draw the same weights on every rank.
    torch.manual_seed(plan.options.seed)
    model_file = load_model_file(model_path)
    try:
        with torch.device("meta"):
            model = model_file.build_model()
    except Exception as error:
        raise ModelFileError(
            f"{model_path}: build_model() raised {type(error).__name__}: {error}",
            hint="it is called under torch.device('meta'): read no parameter's value in it",
        ) from error
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"{plan_path} was made for another model ({plan.model_name}, fingerprint "
            f"{plan.fingerprint[:12]}) than {model_path} builds (fingerprint {found[:12]})",
            hint=f"plan again: lga-plan {model_path}",
        )
    return plan, model_file
