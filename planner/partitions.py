"""State partition levels: which parts of the training state the replicas divide among them.

    0   nothing: every replica holds the whole state
    1   the optimizer's state
    2   and the reduced gradients
    3   and the weights

The replicas that divide it are all of a pipeline rank's, or a group of them, such as those of one
host (hybrid sharding): then the members of every group together have the whole state, weights are
gathered inside groups, and gradients are summed over all replicas.

With 1 and 2 every replica computes on whole weights that stay in place and updates its own part of
them, and one gather a unit and step brings the updated parts together. With 3 the whole weights
exist only where a stage needs them. (DeepSpeed calls the levels ZeRO stages.) This module knows the
levels. It does not know sizes, nor who is in a group.
"""

__all__ = [
    "LEVELS", "divides_gradients", "gathers_for_passes", "gathers_updates", "offloaded",
    "partition_text", "updates_on_host",
]  # fmt: skip

LEVELS = (0, 1, 2, 3)


def divides_gradients(partition: int) -> bool:
    """Whether a replica has only its own part of a reduced gradient."""
    return partition >= 2


def gathers_updates(partition: int) -> bool:
    """Whether a replica updates its own part of weights that all replicas keep whole."""
    return partition in (1, 2)


def gathers_for_passes(partition: int, *, offload_state: bool) -> bool:
    """Whether weights are gathered into pools of buffers rather than kept in place.

    An offloaded state leaves weights in place where these are whole for every pass anyway, and no
    replica has the parts of the others (1 and 2).
    """
    return partition == 3 or (offload_state and not gathers_updates(partition))


def offloaded(partition: int, *, offload_state: bool) -> tuple[str, ...]:
    """Kinds of buffers that live in host memory, and come to the device when they are used."""
    if not offload_state:
        return ()
    return ("moments",) if gathers_updates(partition) else ("shard", "moments")


def partition_text(partition: int, group_size: int) -> str:
    """`3`, or `3 within 8` where groups of so many replicas each have all of the state."""
    return f"{partition} within {group_size}" if partition and group_size else str(partition)


def updates_on_host(partition: int, *, offload_state: bool) -> bool:
    """Whether the host has all of the state that an update changes, and can do it there."""
    return offloaded(partition, offload_state=offload_state) == ("shard", "moments")
