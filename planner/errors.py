"""Every error a user can meet, with its exit code and a hint.

LgaError                      exit 1
|-- UsageError                exit 2   the command line or a file's content is wrong
|   |-- ModelFileError                 the model file cannot be loaded or breaks its contract
|   |-- ClusterError                   unknown cluster, or a cluster file that does not validate
|   |-- PlanFileError                  corrupted, edited or incompatible plan
|   '-- FingerprintError               the plan was made for another model
|-- TraceError                exit 1   the model cannot be traced into layers
|-- InfeasibleError           exit 1   no plan fits
|-- CheckError                exit 1   the plan breaks a rule
'-- RunError                  exit 1   the run failed
    |-- DeadlineError                  a wait ran out of time
    |-- PeerLostError                  another rank died or stopped
    '-- VerifyError                    planned and plain gradients differ
"""

__all__ = [
    "CheckError",
    "ClusterError",
    "DeadlineError",
    "FingerprintError",
    "InfeasibleError",
    "LgaError",
    "ModelFileError",
    "PeerLostError",
    "PlanFileError",
    "RunError",
    "TraceError",
    "UsageError",
    "VerifyError",
]


class LgaError(Exception):
    """What went wrong, where, with which values (`message`), and what to try (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class UsageError(LgaError):
    """The command line, or a file it names, is wrong."""

    exit_code = 2


class ModelFileError(UsageError):
    """The model file is missing, does not load, or breaks the model-file contract."""


class ClusterError(UsageError):
    """The cluster or device is unknown, or its file does not validate."""


class PlanFileError(UsageError):
    """The plan file is missing, corrupted, edited, or of another format version."""


class FingerprintError(UsageError):
    """The plan was made for another model."""


class TraceError(LgaError):
    """The model cannot be traced into layers."""


class InfeasibleError(LgaError):
    """No plan fits the devices."""


class CheckError(LgaError):
    """The plan breaks a rule of the checker."""


class RunError(LgaError):
    """The run failed."""


class DeadlineError(RunError):
    """A wait ran out of time."""


class PeerLostError(RunError):
    """Another rank died or stopped answering."""


class VerifyError(RunError):
    """The planned step and plain accumulation differ by more than the stated tolerance."""
