"""Predict: a model, a cluster and a 3D configuration -> step time and memory, without running."""

from planner.predict.compare import configurations, ranked
from planner.predict.predict import predict
from planner.predict.types import Breakdown, Configuration, Predicted

__all__ = [
    "Breakdown",
    "Configuration",
    "Predicted",
    "configurations",
    "predict",
    "ranked",
]
