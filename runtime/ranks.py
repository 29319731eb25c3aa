"""Names of ranks in messages. Knows the numbering of ranks only."""

from planner.layouts import Grid

__all__ = ["rank_name"]


def rank_name(world_rank: int, grid: Grid) -> str:
    """`rank 3 (pipeline rank 1, replica 1)`."""
    pipeline_rank, replica = grid.coordinates(world_rank)
    return f"rank {world_rank} (pipeline rank {pipeline_rank}, replica {replica})"
