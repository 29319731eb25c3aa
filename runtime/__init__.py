"""The runtime: executes a plan. `Executor` runs one rank's part of it."""

from runtime.executor import Executor, StepResult

__all__ = ["Executor", "StepResult"]
