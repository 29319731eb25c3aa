"""Numbers with their nouns, for messages and tables."""

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "s") -> str:
    """`1 rank`, `2 ranks`; `plural` is the ending: `counted(2, "batch", "es")`."""
    return f"{number} {noun}{plural if number != 1 else ''}"
