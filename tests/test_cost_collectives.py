"""Collectives by algorithm against hand calculation."""

from dataclasses import replace

import pytest

from planner.cluster.types import CollectiveAlgorithm, Link
from planner.cost import all_reduce_seconds, gather_seconds, num_rounds, reduce_scatter_seconds

LINK = Link(name="toy", bandwidth=1e9, latency_seconds=1e-5)


@pytest.mark.parametrize(
    ("num_members", "ring", "tree"),
    [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 3, 2), (5, 4, 3), (8, 7, 3), (9, 8, 4), (483, 482, 9)],
)
def test_rounds(num_members: int, ring: int, tree: int) -> None:
    assert num_rounds(num_members, "ring") == ring
    assert num_rounds(num_members, "tree") == num_rounds(num_members, "auto") == tree


@pytest.mark.parametrize("algorithm", ["ring", "tree", "auto"])
@pytest.mark.parametrize("num_members", [1, 2, 3, 8, 483])
def test_every_algorithm_moves_the_same_bytes(
    algorithm: CollectiveAlgorithm, num_members: int
) -> None:
    rounds = num_rounds(num_members, algorithm)
    seconds = rounds * 1e-5 + (num_members - 1) / num_members * 12
    num_bytes = 12 * 10**9
    assert gather_seconds(num_bytes, num_members, LINK, algorithm) == pytest.approx(seconds)
    assert reduce_scatter_seconds(num_bytes, num_members, LINK, algorithm) == pytest.approx(seconds)
    assert all_reduce_seconds(num_bytes, num_members, LINK, algorithm) == pytest.approx(2 * seconds)


def test_a_half_duplex_link_takes_twice_as_long_for_the_bytes() -> None:
    half = replace(LINK, duplex=False)
    assert gather_seconds(4 * 10**9, 4, half) == pytest.approx(3e-5 + 6)
    assert gather_seconds(0, 4, half) == gather_seconds(0, 4, LINK)
