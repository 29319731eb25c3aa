"""What each instruction does: one function per instruction, over the rank's state."""

from runtime.handlers.table import HANDLERS, Action

__all__ = ["HANDLERS", "Action"]
