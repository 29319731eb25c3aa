"""Collectives: bytes and members -> seconds, by algorithm.

Every algorithm here moves the least bytes that any can: (D - 1) / D of the whole leave and reach
each member. They differ in how many messages one after the other that takes, and in which members
talk to each other. Does not know where members are, nor what else uses their links.
"""

from planner.cluster.types import CollectiveAlgorithm, Link

__all__ = ["all_reduce_seconds", "gather_seconds", "num_rounds", "reduce_scatter_seconds"]


def num_rounds(num_members: int, algorithm: CollectiveAlgorithm) -> int:
    """Messages that follow one another in an all-gather or a reduce-scatter.

    ring: D - 1. Thakur, Rabenseifner and Gropp, "Optimization of collective communication
    operations in MPICH", IJHPCA 19(1), 2005.
    tree: the logarithm of D to base 2, rounded up. Bruck, Ho, Kipnis, Upfal and Weathersby,
    "Efficient algorithms for all-to-all communications in multiport message-passing systems",
    IEEE TPDS 8(11), 1997; for powers of 2 it is recursive doubling (of the first source).
    auto: the fewer.
    """
    ring, tree = num_members - 1, (num_members - 1).bit_length()
    return ring if algorithm == "ring" else min(ring, tree)


def gather_seconds(
    num_bytes: int, num_replicas: int, link: Link, algorithm: CollectiveAlgorithm = "ring"
) -> float:
    """All-gather of `num_bytes` (the full size, all shards together) over D replicas.

        rounds x latency + (D - 1) / D x bytes / bandwidth

    Sources: `num_rounds`; the bandwidth term is also that of nccl-tests' PERFORMANCE.md. Members
    send and receive at once, so a half-duplex link takes twice as long for the bytes. 0 for one
    replica.
    """
    bandwidth = link.bandwidth if link.duplex else link.bandwidth / 2
    rounds = num_rounds(num_replicas, algorithm)
    return rounds * link.latency_seconds + (num_replicas - 1) * num_bytes / num_replicas / bandwidth


def reduce_scatter_seconds(
    num_bytes: int, num_replicas: int, link: Link, algorithm: CollectiveAlgorithm = "ring"
) -> float:
    """Reduce-scatter of `num_bytes` (the full, unpartitioned size) over D replicas.

    The rounds are those of the all-gather in reverse (same sources); the additions are not
    counted. A direct exchange of shards between all pairs sends as many bytes. 0 for one replica.
    """
    return gather_seconds(num_bytes, num_replicas, link, algorithm)


def all_reduce_seconds(
    num_bytes: int, num_replicas: int, link: Link, algorithm: CollectiveAlgorithm = "ring"
) -> float:
    """All-reduce of `num_bytes` over D replicas: a reduce-scatter, then an all-gather.

    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
    JPDC 69(2), 2009: 2 (D - 1) / D of the bytes leave each rank, and no algorithm sends fewer.
    """
    return 2 * gather_seconds(num_bytes, num_replicas, link, algorithm)
