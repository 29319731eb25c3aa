"""The runtime: executes a plan. `Executor` runs one rank's part; `runtime.main` runs a whole job."""

from runtime.executor import Executor, StepResult

__all__ = ["Executor", "StepResult"]
