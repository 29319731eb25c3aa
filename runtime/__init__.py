"""The runtime executes a plan. `connect` joins its ranks; `Executor` runs one rank's part."""

from runtime.checkpoint import CheckpointInfo
from runtime.connect import connect
from runtime.executor import Executor
from runtime.hooks import GradientPart, Gradients
from runtime.result import StepResult

__all__ = ["CheckpointInfo", "Executor", "GradientPart", "Gradients", "StepResult", "connect"]
