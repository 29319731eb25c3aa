"""The rules that every plan must keep, proved before it runs."""

from planner.check.checker import RULES, check
from planner.check.types import Report, Verdict

__all__ = ["RULES", "Report", "Verdict", "check"]
