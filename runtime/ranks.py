"""Names of ranks in messages. Knows the numbering of ranks only."""

__all__ = ["rank_name"]


def rank_name(world_rank: int, num_replicas: int) -> str:
    """`rank 3 (pipeline rank 1, replica 1)`; replicas are innermost."""
    pipeline_rank, replica = divmod(world_rank, num_replicas)
    return f"rank {world_rank} (pipeline rank {pipeline_rank}, replica {replica})"
