"""What a checkpoint holds of optimizers and schedulers, by parameter: any layout can take it up.

Every unit has an optimizer and a scheduler of its own, and another plan has other units. So
settings of groups (learning rate, weight decay, ...) are kept by parameter, and of a scheduler what
is not by group. This module knows torch's optimizers. It does not know files.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from runtime.optimize import UnitOptimizer

__all__ = ["put_scheduler", "put_settings", "scheduler_of", "settings_of"]

Settings = dict[str, dict[str, Any]]
"""Settings of a parameter's group, by the parameter's name."""

_BY_GROUP = ("base_lrs", "base_momentums", "max_lrs", "max_momentums", "min_lrs", "lr_lambdas",
             "_lr_lambdas", "_last_lr")  # fmt: skip
"""What torch's schedulers keep one of for each group."""


def settings_of(optimizers: Iterable[UnitOptimizer]) -> Settings:
    """Of every parameter that they update."""
    found: Settings = {}
    for optimizer in optimizers:
        names = {id(parameter): name for name, parameter in optimizer.pieces.items()}
        for group in optimizer.optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            found |= {names[id(p)]: settings for p in group["params"] if id(p) in names}
    return found


def put_settings(optimizer: UnitOptimizer, settings: Settings) -> None:
    """Each group takes those of its first parameter that has some."""
    names = {id(parameter): name for name, parameter in optimizer.pieces.items()}
    for group in optimizer.optimizer.param_groups:
        known = [names[id(p)] for p in group["params"] if names.get(id(p)) in settings]
        if known:
            group.update(settings[known[0]])


def scheduler_of(optimizers: Iterable[UnitOptimizer]) -> dict[str, Any] | None:
    """Where the schedule stands, alike for all groups; None where the rate is constant."""
    for optimizer in optimizers:
        if optimizer.scheduler is not None:
            return _common(optimizer.scheduler.state_dict())
    return None


def put_scheduler(optimizer: UnitOptimizer, saved: Mapping[str, Any] | None) -> None:
    """Go on where `scheduler_of` stood; settings of the groups must be there already."""
    scheduler = optimizer.scheduler
    if scheduler is None or saved is None:
        return
    groups = optimizer.optimizer.param_groups
    first_rates = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = [_number(group["lr"]) for group in groups]
    scheduler.load_state_dict(_merged(scheduler.state_dict(), saved, first_rates, rates))


def _common(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in state.items() if key not in _BY_GROUP}
    for key, value in found.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            found[key] = [_common(e) if isinstance(e, dict) else e for e in value]
    return found


def _merged(
    fresh: Mapping[str, Any], saved: Mapping[str, Any], first_rates: list[Any], rates: list[Any]
) -> dict[str, Any]:
    """A scheduler's new state: what is by group is its own; schedulers inside it alike."""
    found = {**fresh, **saved, "base_lrs": first_rates, "_last_lr": rates}
    for key, value in saved.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            pairs = zip(fresh[key], value, strict=True)
            found[key] = [_merged(mine, its, first_rates, rates) for mine, its in pairs]
    return {key: value for key, value in found.items() if key in fresh}


def _number(rate: Any) -> float:
    return float(rate) if isinstance(rate, torch.Tensor) else rate
