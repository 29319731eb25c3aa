"""What a rank does between two of its stages: gathers, reductions, updates, copies of the state.

It follows the places that `planner.lower` gives them in the layered order. A gather starts when its
buffer is free, a reduction when its stage is done; both queue on the rank's data stream. An update
stands behind its stage, or with replicas behind the next one, so that the reduction hides. A state
in host memory is fetched one gather and one update ahead, over a stream of its own for each way.
Where it is updated there, each gradient goes down in the place of the update, which is issued with
the next one and runs beside compute, on a stream of the host.
This module knows the order of a rank's work. It does not know how long any of it takes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from planner.solve.step_parts import LOOKAHEAD, Pace, StageTicks, Ticks

__all__ = ["Arrivals", "Streams"]


class Arrivals(NamedTuple):
    """When the micro-batches of a stage have come from its neighbour."""

    first: Ticks
    last: Ticks


class Streams:
    """The moments at which each rank's streams are free, as the step goes on."""

    def __init__(
        self, stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks]
    ) -> None:
        self._stages, self._pace, self._latest = stages, pace, latest
        zeros: list[Ticks] = [0] * pace.num_ranks
        self.held = zeros.copy()
        """Per rank: when its next compute may be issued."""
        self.gathered: dict[int, Ticks] = {}
        """Per stage: when its weights are there for forward."""
        self.regathered: dict[int, Ticks] = {}
        """The same for backward, unless they are there still."""
        self.reduced: dict[int, Ticks] = {}
        self._data, self._in, self._out = zeros.copy(), zeros.copy(), zeros.copy()
        self._host = zeros.copy()
        self._shards: dict[int, Ticks] = {}
        """Per stage: when its shard has come from the host for the next gather."""
        self._state: dict[int, Ticks] = {}
        """Per stage: when what its update needs has come from the host."""
        self._holds: dict[int, Ticks] = {}
        """Per stage: until when what stands behind it holds up its rank."""
        self._closed: dict[int, Ticks] = {}
        self._left: dict[int, Ticks] = {}
        """Per stage: when its updated state, or its gradient, has gone to the host."""
        self._links: dict[tuple[int, int], Ticks] = {}
        """Per pair of ranks: when the last message of the one to the other has come."""
        if pace.gathers:
            for rank, own in enumerate(pace.own):
                self._begin(rank, own)

    def _begin(self, rank: int, own: Sequence[int]) -> None:
        """The first gathers, into buffers that are free from the start."""
        if self._pace.offloads_state:
            self._in[rank] = self.held[rank] = self._stages[own[0]].shard
            self._shards[own[0]] = self._in[rank]
            self._gather(rank, own[0], self.held[rank], self.gathered)
            if len(own) > 1:
                self._fetch_shard(rank, own[1], self.held[rank])
            return
        self._data[rank] = self._pace.issue
        for stage in own[: self._pace.num_buffers]:
            self.held[rank] = self.held[rank] + self._pace.issue
            self._data[rank] = self.gathered[stage] = self._data[rank] + self._stages[stage].gather

    def transfer(
        self, source: int, target: int, opened: Ticks, closed: Ticks, ticks: Ticks
    ) -> Arrivals:
        """All micro-batches from one stage to the next, one after the other: behind those that the
        rank has sent to the other before."""
        ranks, latest = self._pace.stage_ranks, self._latest
        pair = ranks[source], ranks[target]
        if pair[0] == pair[1]:
            return Arrivals(opened, closed)
        if pair in self._links:
            opened = latest(opened, self._links[pair])
        first = opened + ticks
        count = self._pace.num_micro_batches
        last = latest(closed, opened + (count - 1) * ticks) + ticks
        self._links[pair] = last
        return Arrivals(first, last)

    def after_first_forward(self, stage: int, opened: Ticks, done: list[Ticks]) -> None:
        """A state in host memory: the next of the first gathers, which may hold up the rank."""
        pace, rank = self._pace, self._pace.stage_ranks[stage]
        following = pace.following[stage]
        if following < 0 or pace.takes_back[following] >= 0:
            return
        issued = self._latest(opened, self._shards[following])
        self._gather(rank, following, issued, self.gathered)
        if pace.num_micro_batches > 1:
            done.append(issued + (pace.num_micro_batches - 1) * self._stages[stage].forward)
        else:
            self._holds[stage] = issued
        after = pace.following[following]
        is_taken_over = after >= 0 and pace.takes_back[after] >= 0
        if after >= 0 and not (is_taken_over and pace.num_buffers > 2):
            self._fetch_shard(rank, after, issued)

    def after_forward(self, stage: int, closed: Ticks) -> None:
        """The gather into its buffer."""
        pace, rank = self._pace, self._pace.stage_ranks[stage]
        self.held[rank] = closed
        if not pace.gathers:
            return
        self._closed[stage] = closed
        if stage in self._holds:
            self.held[rank] = self._latest(closed, self._holds[stage])
        taker = pace.takes_over[stage]
        if taker >= 0:
            # Its buffer is released first.
            self.held[rank] = self.held[rank] + pace.issue
        if pace.offloads_state:
            if taker >= 0:
                if taker not in self._shards:
                    self._fetch_shard(rank, taker, closed)
                issued = self._latest(self.held[rank], self._shards[taker])
                self.held[rank] = issued
                self._gather(rank, taker, issued, self.gathered)
                following = pace.following[taker]
            else:
                following, issued = -1, closed
            if following >= 0 and following not in self._shards:
                self._fetch_shard(rank, following, issued)
            if pace.following[stage] < 0 and pace.takes_back[stage] >= 0:
                self._fetch_shard(rank, pace.takes_back[stage], self._before_backward(stage))
        elif taker >= 0:
            self.held[rank] = self.held[rank] + pace.issue
            self._gather(rank, taker, self.held[rank], self.gathered)

    def _before_backward(self, stage: int) -> Ticks:
        """As many compute steps before a stage's backward ends as it has micro-batches, or two."""
        before = self._pace.preceding[stage]
        return self._closed[stage if self._pace.num_micro_batches > 1 else before]

    def after_backward(self, stage: int, opened: Ticks, closed: Ticks) -> None:
        """The gather into its buffer, its reduction, and the update that has its turn."""
        pace, rank, latest = self._pace, self._pace.stage_ranks[stage], self._latest
        if pace.fetches_state and pace.own[rank][-1] not in self._state:
            self._fetch_first(rank, stage, opened)
        taker = pace.takes_back[stage] if pace.gathers else -1
        issued = closed + pace.issue if pace.gathers else closed
        if taker >= 0:
            if pace.offloads_state:
                issued = latest(closed, self._shards[taker])
            issued = issued + pace.issue
            self._gather(rank, taker, issued, self.regathered)
            if pace.offloads_state and pace.preceding[taker] >= 0:
                self._fetch_shard(rank, pace.preceding[taker], issued)
        self.held[rank] = issued
        if pace.reduces:
            self.held[rank] = issued = issued + pace.issue
            moved = latest(issued, self._data[rank]) + self._stages[stage].reduce
            self._data[rank] = self.reduced[stage] = moved
        ready = pace.following[stage] if pace.reduces else stage
        if pace.updates_on_host:
            self._send_down(rank, ready)
        elif not (pace.updates_wait or pace.updates_early):
            self._update(rank, ready)

    def _send_down(self, rank: int, stage: int) -> None:
        """The gradient of a stage, if there is one, behind the update of the one before."""
        if stage < 0:
            return
        pace, latest, before = self._pace, self._latest, self._pace.following[stage]
        if before >= 0 and not pace.updates_wait:
            self._update_on_host(rank, before)
        if pace.reduces:
            self.held[rank] = latest(self.held[rank], self.reduced[stage])
        started = latest(self.held[rank], self._out[rank])
        self._out[rank] = self._left[stage] = started + self._stages[stage].moments

    def _update_on_host(self, rank: int, stage: int) -> None:
        """Issued when the gradient is there."""
        self.held[rank] = self._latest(self.held[rank], self._left[stage])
        started = self._latest(self.held[rank], self._host[rank])
        self._host[rank] = started + self._stages[stage].update

    def update_early(self, stage: int, opened: Ticks, almost: Ticks) -> Ticks:
        """Of the stage before in backward, when all but one micro-batch of this one are done."""
        rank = self._pace.stage_ranks[stage]
        if self._pace.offloads_state:
            self._fetch_first(rank, stage, opened)
        self.held[rank] = almost
        self._update(rank, self._pace.following[stage])
        return self.held[rank]

    def _gather(self, rank: int, stage: int, issued: Ticks, found: dict[int, Ticks]) -> None:
        """On the data stream."""
        started = self._latest(issued, self._data[rank])
        self._data[rank] = found[stage] = started + self._stages[stage].gather

    def _fetch_shard(self, rank: int, stage: int, issued: Ticks) -> None:
        self._in[rank] = self._latest(issued, self._in[rank]) + self._stages[stage].shard
        self._shards[stage] = self._in[rank]

    def _fetch_first(self, rank: int, stage: int, opened: Ticks) -> None:
        """Of the first update, a few micro-batches before it has its turn."""
        pace = self._pace
        own = pace.own[rank]
        at = own[0] if pace.updates_wait else own[-2:][0] if pace.reduces else own[-1]
        if stage != at:
            return
        if pace.num_micro_batches > 2 * LOOKAHEAD:
            self._fetch_state(rank, own[-1], opened)
            return
        # It may stand in any stage before: at best it is alone, and there early.
        ticks = self._stages[own[-1]]
        self._state[own[-1]] = ticks.moments

    def _fetch_state(self, rank: int, stage: int, issued: Ticks) -> None:
        """Moments, and the shard unless its gather for backward has brought it."""
        pace, ticks = self._pace, self._stages[stage]
        arrived = self._latest(issued, self._in[rank]) + ticks.moments
        if pace.gathers and pace.takes_over[stage] < 0:
            arrived = arrived + ticks.shard
        self._in[rank] = self._state[stage] = arrived

    def _update(self, rank: int, stage: int) -> None:
        """Of a stage, if there is one; the stage before is fetched, the one behind is gone."""
        if stage < 0:
            return
        pace, latest, ticks = self._pace, self._latest, self._stages[stage]
        ready = [self.reduced[stage]] if pace.reduces else []
        if pace.offloads_state:
            following, preceding = pace.following[stage], pace.preceding[stage]
            if following >= 0:
                self.held[rank] = latest(self.held[rank], self._left[following])
            if preceding >= 0 and preceding not in self._state:
                self._fetch_state(rank, preceding, self.held[rank])
            ready.append(self._state[stage])
        if ready:
            self.held[rank] = latest(self.held[rank], *ready)
        self.held[rank] = updated = self.held[rank] + pace.issue + ticks.update
        if pace.offloads_state:
            leaving = ticks.moments + ticks.shard if pace.gathers else ticks.moments
            self._out[rank] = self._left[stage] = latest(updated, self._out[rank]) + leaving
        if pace.gathers_updated:
            self._data[rank] = latest(updated, self._data[rank]) + ticks.gather_updated

    def _fetch_seconds(self) -> None:
        """At the end of the step, what the second update needs does not wait for the verdict."""
        for rank, own in enumerate(self._pace.own):
            if self._pace.fetches_state and len(own) > 1:
                self._fetch_state(rank, own[-2], self.held[rank])

    def end(self) -> Ticks:
        """After the updates that are still open: the end of the step."""
        pace, latest = self._pace, self._latest
        if pace.updates_on_host and pace.reduces:
            for rank, own in enumerate(pace.own):
                self._send_down(rank, own[0])
        if pace.updates_wait:
            self._fetch_seconds()
            reads = [sum(self._stages[stage].read for stage in own) for own in pace.own]
            moments = [*self.held, *(self._data if pace.reduces else [])]
            judged = latest(0, *moments) + pace.num_verdicts * latest(0, *reads) + pace.verdict
            self.held = [judged] * pace.num_ranks
        joined = [self.held[rank] for rank in pace.tied_ranks]
        joined += [self._data[rank] for rank in pace.tied_ranks] if pace.reduces else []
        for rank, own in enumerate(pace.own):
            is_late = pace.reduces or pace.updates_on_host
            waiting = own if pace.updates_wait else own[:1] if is_late else ()
            for stage in reversed(waiting):
                if pace.updates_on_host:
                    self._update_on_host(rank, stage)
                else:
                    self._update(rank, stage)
        last = [*self.held]
        if joined:
            # Of all updates that wait for the end, that of the tied weights is the last.
            added = latest(*joined) + pace.tied
            updated = [
                (self._host if pace.updates_on_host else self.held)[rank]
                for rank in pace.tied_ranks
            ]
            last.append(latest(added, *updated) + pace.tied_update)
        last += self._data if pace.gathers_updated else []
        last += self._out if pace.offloads_state else []
        last += self._host if pace.updates_on_host else []
        return latest(*last) if len(last) > 1 else last[0]
