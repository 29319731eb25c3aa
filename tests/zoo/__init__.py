"""Tiny models of every kind that people train, one model file each.

All have random weights and at least four layers. What holds for a model (a tied weight on two
ranks, say) is read from its plan, never listed here.
"""

from pathlib import Path

__all__ = ["PATHS"]

PATHS = {path.stem: path for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
"""Name -> model file."""
