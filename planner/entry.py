"""Planning from Python in one call: model, example batch and number of devices in, a plan out.

This module knows the arguments. It does not know how a plan is found.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from planner.cluster import Cluster, resolve_cluster
from planner.model_file import model_from_functions
from planner.pipeline import make_plan
from planner.plan.types import Plan

__all__ = ["plan_model"]


def plan_model(
    model: nn.Module | Callable[[], nn.Module],
    example_batch: Callable[[int], dict[str, Tensor]],
    *,
    num_devices: int,
    cluster: Cluster | str | None = None,
    loss_fn: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
    build_optimizer: Callable[[Any], Optimizer] | None = None,
    **demands: Any,
) -> Plan:
    """The plan that `lga-plan` would write.

    Call it once, before the ranks start: a search that is limited in time may end differently on
    each of them.

    Args:
        model: as it is trained, or the function that builds it; it is not changed.
        example_batch: as in the model file: number of samples -> one batch.
        num_devices: at most so many are used.
        cluster: or the name of one, as of `lga-plan --cluster`.
        loss_fn: as in the model file; None where the model returns its loss.
        build_optimizer: as in the model file, for its memory; AdamW by default.
        demands: further arguments of `planner.pipeline.make_plan`.

    Raises what `make_plan` raises, and ClusterError where the cluster is unknown.
    """
    if not isinstance(cluster, Cluster):
        cluster = resolve_cluster(cluster, num_devices)
    model_file = model_from_functions(model, example_batch, loss_fn=loss_fn)
    model_file = replace(model_file, build_optimizer=build_optimizer)
    return make_plan(model_file, num_devices=num_devices, cluster=cluster, **demands).plan
