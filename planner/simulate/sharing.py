"""Flows that share links: who gets which rate, and when each is through.

Max-min fairness by progressive filling (Bertsekas and Gallager, Data Networks, 2nd edition, 1992,
section 6.5.2): all rates grow alike until a resource is full; its flows keep their rate, the others
grow on. Rates are found again when a flow begins or ends, but only those of flows connected to it
through shared resources; a flow that is alone on its resources costs a few look-ups. This module
does not know instructions, nor what a resource is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from planner.simulate.links import Path

__all__ = ["Flows", "Landing", "fair_rates"]

Landing = tuple[float, int, int]
"""(seconds, flow, version): when the flow's last byte leaves, unless its version has changed."""


@dataclass(slots=True, kw_only=True)
class _Flow:
    path: Path
    begun: float
    remaining_bytes: float
    """At `since`."""
    since: float
    rate: float
    version: int
    """One more each time its rate changes."""
    is_disturbed: bool
    """Whether it has changed."""


@dataclass(slots=True, kw_only=True)
class Flows:
    """The flows under way."""

    capacities: Sequence[float]
    """Bytes per second of each resource."""
    _active: dict[int, _Flow] = field(default_factory=dict)
    _users: list[set[int]] = field(default_factory=list)

    def begin(
        self, flow: int, now: float, path: Path, num_bytes: float, version: int = 0
    ) -> Iterable[Landing]:
        """A new flow, known by its number; returns when flows land now that their rates differ.

        Where the number was another flow's before, `version` is above all of that one's.
        """
        users = self._users
        alone = True
        for resource, _ in path.contended:
            while resource >= len(users):
                users.append(set())
            alone = alone and not users[resource]
            users[resource].add(flow)
        self._active[flow] = _Flow(
            path=path,
            begun=now,
            remaining_bytes=num_bytes,
            since=now,
            rate=path.rate,
            version=version,
            is_disturbed=False,
        )
        landing = (now + num_bytes / path.rate, flow, version)
        if alone:
            return (landing,)
        return [landing, *self._share(self._connected([flow]), now)]

    def end(self, landing: Landing, num_bytes: float) -> tuple[float, Iterable[Landing]] | None:
        """When the flow that landed is over, and when others land now; None if it is not over."""
        now, number, version = landing
        flow = self._active.get(number)
        if flow is None or flow.version != version:
            return None
        del self._active[number]
        path = flow.path
        neighbours: set[int] = set()
        for resource, _ in path.contended:
            users = self._users[resource]
            users.remove(number)
            if users:
                neighbours |= users
        # Undisturbed, it takes what the formula says, to the last bit.
        undisturbed = flow.begun + (path.latency_seconds + num_bytes / path.rate)
        over = now + path.latency_seconds if flow.is_disturbed else undisturbed
        if not neighbours:
            return over, ()
        return over, self._share(self._connected(neighbours), now)

    def _connected(self, some: Iterable[int]) -> list[int]:
        """These flows and all that share resources with them, directly or not; ascending."""
        found = set(some)
        front = list(found)
        seen: set[int] = set()
        while front:
            for resource, _ in self._active[front.pop()].path.contended:
                if resource not in seen:
                    seen.add(resource)
                    fresh = self._users[resource] - found
                    found |= fresh
                    front.extend(fresh)
        return sorted(found)

    def _share(self, numbers: list[int], now: float) -> list[Landing]:
        """Give connected flows their fair rates; returns the landings that change."""
        flows = [self._active[number] for number in numbers]
        rates = fair_rates([flow.path.contended for flow in flows], self.capacities)
        landings = []
        for number, flow, rate in zip(numbers, flows, rates, strict=True):
            if rate == flow.rate:
                continue
            gone = (now - flow.since) * flow.rate
            flow.remaining_bytes = max(0.0, flow.remaining_bytes - gone)
            flow.since, flow.rate = now, rate
            flow.version += 1
            flow.is_disturbed = True
            landings.append((now + flow.remaining_bytes / rate, number, flow.version))
        return landings


def fair_rates(
    flows: Sequence[Sequence[tuple[int, int]]], capacities: Sequence[float]
) -> list[float]:
    """The max-min fair rate of each flow.

    Args:
        flows: per flow, (resource, bytes there per byte of the flow); at least one each.
        capacities: bytes per second by resource.
    """
    left: dict[int, float] = {}
    weight: dict[int, int] = {}
    users: dict[int, list[int]] = {}
    for index, uses in enumerate(flows):
        for resource, number in uses:
            left.setdefault(resource, capacities[resource])
            weight[resource] = weight.get(resource, 0) + number
            users.setdefault(resource, []).append(index)
    rates: list[float | None] = [None] * len(flows)
    while weight:
        full = min(weight, key=lambda resource: (left[resource] / weight[resource], resource))
        rate = left[full] / weight[full]
        for index in users[full]:
            if rates[index] is not None:
                continue
            rates[index] = rate
            for resource, number in flows[index]:
                left[resource] = max(0.0, left[resource] - number * rate)
                weight[resource] -= number
                if not weight[resource]:
                    del weight[resource]
    return [0.0 if rate is None else rate for rate in rates]
