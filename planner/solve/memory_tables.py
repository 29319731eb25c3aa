"""The tables of a rank's memory: what stays, what is stored, what is there at the worst moments.

The simulator accounts for every buffer of the finished program, at the worst that any interleaving
of its streams can hold: what nothing proves to be over may still be there. The moments here are
where that is the most, and the tables what is there then.
This module knows the layered order. It does not know limits, nor how moments are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.partitions import divides_gradients, gathers_updates, offloaded
from planner.solve.choices import Choice
from planner.solve.crossings import Crossings
from planner.solve.figures import Figures
from planner.solve.memory import (
    Held,
    Layers,
    less,
    most,
    num_buffers,
    parameters_of,
    per_shard,
    reduced_bytes,
    times,
    total,
)
from planner.solve.moments import MemoryTables, Moment, Near
from planner.solve.problem import Problem
from planner.solve.step_parts import LOOKAHEAD
from planner.solve.tables import Table

__all__ = ["memory_tables"]


def memory_tables(
    figures: Figures, crossings: Crossings, choice: Choice, problem: Problem, unit: int
) -> MemoryTables:
    """The memory of each stage under a choice, in units of so many bytes."""
    held = Held(figures=figures, choice=choice, problem=problem, crossings=crossings, unit=unit)
    waits, buffers = problem.updates_wait, num_buffers(choice)
    keeps_sums = waits and not held.reduces
    return MemoryTables(
        state=held.table(_state(held, keeps_sums=keeps_sums)),
        gather=held.table(held.weights),
        num_gather_buffers=buffers if held.gathers else 0,
        sums=held.table(0 if keeps_sums else held.trainable),
        num_sum_buffers=buffers if held.reduces else 1 + held.updates_on_host,
        alternates=(
            not divides_gradients(choice.partition) if held.reduces else held.updates_on_host
        ),
        stored=(_stored(held), _stored_inputs(held)),
        waiting=held.table(_waiting(held) if waits else 0),
        moments=(*_compute_moments(held), *_end_moments(held)),
    )


def _state(held: Held, *, keeps_sums: bool) -> list[int]:
    """Through the whole step."""
    found, choice = parameters_of(held.figures, held.choice), held.choice
    kinds = offloaded(choice.partition, offload_state=choice.offload_state)
    state = list(held.shards if held.gathers else held.in_place)
    if "shard" in kinds:
        state = [0] * len(state)
    if "moments" not in kinds:
        state = total(state, held.moments)
    # Tied weights have buffers of their own, one each.
    state = total(state, found.tied_trainable_bytes)
    if held.gathers:
        state = total(state, found.tied_weight_bytes)
    if held.reduces:
        state = total(state, reduced_bytes(found.tied_trainable_bytes, choice))
    return total(state, held.trainable) if keeps_sums else state


def _waiting(held: Held) -> list[int]:
    """From a stage's backward to the end of the step, where updates stand there: its reduced
    gradient, and the shard that has come for its gather, unless the host has what it updates."""
    keeps_shards = held.choice.offload_state and not held.updates_on_host
    return total(held.reduced, held.shards) if keeps_shards else held.reduced


def _stored(held: Held) -> Table:
    """Of all micro-batches: what backward needs."""
    figures, crossings, count = held.figures, held.crossings, held.choice.num_micro_batches
    kept = [0] * (figures.num_layers + 1) if held.choice.offload_inputs else crossings.kept_inputs
    return held.table(
        times(count, total(figures.saved_bytes, figures.layer_batch_bytes)),
        entry=times(count, kept),
        leave=times(-count, crossings.kept_elsewhere),
    )


def _stored_inputs(held: Held) -> Table:
    """Of all micro-batches: what recompute needs."""
    figures, count = held.figures, held.choice.num_micro_batches
    if held.choice.offload_inputs:
        return held.table(times(count, figures.changed_buffer_bytes))
    return held.table(
        times(count, total(figures.layer_batch_bytes, figures.changed_buffer_bytes)),
        entry=times(count, held.crossings.inputs),
    )


def _compute_moments(held: Held) -> list[Moment]:
    """While a stage is computed: the end of its forward, before and at its first backward.

    Nothing tells a rank that its last stage's outputs have left before the first gradient comes
    back, nor that the gradients that it has sent have arrived before others come that wait for
    those.
    """
    count, crossings = held.choice.num_micro_batches, held.crossings
    work = _work(held)
    in_flight = _in_flight(held)
    rebuilt = held.figures.saved_bytes

    def moment(
        plain: Layers,
        again: Layers,
        *,
        pending: int = 0,
        sent: int = 0,
        only: Literal["", "last"] = "",
    ) -> Moment:
        """`plain` and `again` (recomputed) are of the stage's end cut."""
        unsaved = pending if held.choice.stages_per_rank * count > LOOKAHEAD else count - 1
        late = (
            times(min(pending, unsaved), crossings.unsaved_outputs),
            times(pending, crossings.outputs),
        )
        gradients = times(sent, crossings.gradients)
        return Moment(
            stored="with own",
            own=(
                held.table(0, entry=in_flight, leave=total(plain, late[0])),
                held.table(rebuilt, entry=in_flight, leave=total(again, late[1])),
            ),
            near=(*near, *([Near(1, held.table(0, entry=gradients))] if sent else [])),
            waiting=1 if held.problem.updates_wait else None,
            only=only,
        )

    near = [*_data_near(held), *_state_near(held, is_early=True), *_early_near(held)]
    # Of its outputs' gradients a stage has the first few, or all that its own rank has made.
    given = [
        times(min(count, number) if held.is_pipeline else count, crossings.gradients)
        for number in range(LOOKAHEAD + 2)
    ]
    rest = crossings.kept_elsewhere
    before = given[3], less(most(total(given[1], work.again), given[2]), rest)
    first = total(given[3], work.backward), less(total(given[2], work.backward), rest)
    sends = count if held.is_pipeline else 0
    found = [
        *_forward_moments(held, work),
        moment(*before, sent=sends),
        moment(*first, sent=max(0, sends - 1)),
    ]
    if held.is_pipeline:
        found.append(moment(*before, pending=count, only="last"))
    if held.choice.offload_state and not held.updates_on_host and count > 2 * LOOKAHEAD:
        found.append(_late_moment(held, *first))
    if held.updates_on_host:
        found += _gathering_moments(held, before[0], near)
    return found


def _gathering_moments(held: Held, plain: Layers, near: Sequence[Near]) -> list[Moment]:
    """While the shard of a stage is there for its gather, where its update needs none: before the
    first forward of a rank, and before a backward that runs no forward again."""
    crossings, in_flight = held.crossings, _in_flight(held)
    ahead = min(held.choice.num_micro_batches, LOOKAHEAD + 1)
    come = held.table(held.shards, entry=times(ahead, crossings.inputs))
    shards = held.table(held.shards)
    return [
        Moment(
            stored="nothing", own=(come, come), near=(Near(1, shards),), waiting=None, only="first"
        ),
        Moment(
            stored="with own",
            own=(
                held.table(0, entry=in_flight, leave=plain),
                held.table(0, entry=in_flight),
            ),
            near=(*near, Near(0, shards, num_buffers(held.choice))),
            waiting=1 if held.problem.updates_wait else None,
        ),
    ]


def _late_moment(held: Held, plain: Layers, again: Layers) -> Moment:
    """Before the last few micro-batches of a stage's backward, when the state for the first update
    has come; `plain` and `again` (recomputed) are of the stage's end cut."""
    figures, crossings, number = held.figures, held.crossings, LOOKAHEAD + 1
    sent = times(held.choice.num_micro_batches, crossings.gradients)
    kept = times(number, total(figures.saved_bytes, figures.layer_batch_bytes))
    elsewhere = times(-number, crossings.kept_elsewhere)
    own = (
        held.table(
            kept,
            entry=total(times(number, crossings.kept_inputs), sent),
            leave=total(elsewhere, plain),
        ),
        held.table(
            figures.saved_bytes, entry=total(times(number, crossings.inputs), sent), leave=again
        ),
    )
    near = (*_data_near(held), *_state_near(held))
    waiting = 1 if held.problem.updates_wait else None
    return Moment(stored="before", own=own, near=near, waiting=waiting)


def _forward_moments(held: Held, work: "_Work") -> list[Moment]:
    """At the end of a stage's forward: all that it makes may be on its way, and more has come.

    The inputs of the next stage, or of the last one the gradients of its outputs.
    """
    count, crossings = held.choice.num_micro_batches, held.crossings
    # A forward's outputs are a part of its peak.
    pending = total(
        times(count - 1, crossings.unsaved_outputs),
        most(crossings.unsaved_outputs, work.forward),
    )
    late = total(times(count - 1, crossings.outputs), most(crossings.outputs, work.unsaved))
    in_flight = _in_flight(held)
    received = times(min(count, LOOKAHEAD), crossings.inputs)
    reach = range(1, 2 if count > 1 else LOOKAHEAD + 1)
    following = [Near(d, held.table(0, entry=received)) for d in reach if held.is_pipeline]

    def moment(plain: Layers, again: Layers, only: Literal["", "last"] = "") -> Moment:
        return Moment(
            stored="with own",
            own=(
                held.table(0, entry=in_flight, leave=plain),
                held.table(0, entry=in_flight, leave=again),
            ),
            near=(*following, *_state_near(held, forward=True), *_early_near(held)),
            waiting=None,
            only=only,
        )

    found = [moment(pending, late)]
    if held.is_pipeline:
        given = times(min(count, LOOKAHEAD), crossings.gradients)
        last = total(pending, given), total(late, crossings.gradients)
        found.append(moment(*last, only="last"))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Per end cut of a stage: its peaks above what it keeps of a micro-batch."""

    forward: list[int]
    unsaved: list[int]
    """Of a forward that keeps nothing."""
    again: list[int]
    """Of the second forward."""
    backward: list[int]


def _work(held: Held) -> _Work:
    figures = held.figures
    elsewhere = held.crossings.kept_elsewhere
    forward = _forward_peaks(figures, elsewhere)
    return _Work(
        forward=forward,
        unsaved=[0, *figures.forward_transient_bytes],
        again=forward,
        backward=_backward_peaks(figures, elsewhere),
    )


def _end_moments(held: Held) -> list[Moment]:
    """When a stage is done: its gradients are summed, and an update has its turn."""
    gradients = times(held.choice.num_micro_batches, held.crossings.gradients)
    waits, state = held.problem.updates_wait, _state_near(held, at_end=True)
    leaving = [Near(2, held.table(held.reduced))] if held.updates_on_host and held.reduces else []
    state = [*state, *([] if waits else leaving)]

    def moment(own: Table, *behind: Table, only: Literal["", "first", "last"] = "") -> Moment:
        return Moment(
            stored="before",
            own=(own, own),
            near=(*(Near(1, table) for table in behind), *state),
            waiting=0 if waits else None,
            only=only,
        )

    if waits:
        last = _last_update(held)
        return [moment(held.table(held.staging, entry=gradients), *_staged(held)), last]
    none = [0] * held.figures.num_layers
    update = held.table(none, entry=gradients)
    if not held.updates_on_host:
        update = _update_table(held, gradients)
    if not held.reduces:
        return [moment(update)]
    moved = total(held.reduced, held.staging)
    summed = held.table(moved, entry=gradients)
    updated = _update_table(held, [0] * len(gradients), more=held.reduced)
    first = moment(_update_table(held, gradients, more=held.reduced), only="first")
    if gathers_updates(held.choice.partition) and held.choice.num_micro_batches > 1:
        # The stage before was updated ahead of the last micro-batch.
        return [moment(summed), moment(held.table(0, entry=gradients), updated), first]
    behind = held.table(moved if num_buffers(held.choice) > 1 else held.reduced)
    if held.updates_on_host:
        return [moment(summed, behind)]
    return [moment(summed, behind), moment(summed, updated), first]


def _staged(held: Held) -> list[Table]:
    """What the sum of the stage before still makes where gradients wait."""
    return [held.table(held.staging)] if held.reduces and num_buffers(held.choice) > 1 else []


def _last_update(held: Held) -> Moment:
    """Where all updates stand at the end of the step: any of them, all gradients there."""
    own = _update_table(held, [0] * (held.figures.num_layers + 1))
    if held.updates_on_host:
        own = held.table(0)
    away = held.table(held.moments)
    return Moment(
        stored="nothing",
        own=(own, own),
        near=(
            (Near(0, away), Near(-1, away))
            if held.choice.offload_state and not held.updates_on_host
            else ()
        ),
        waiting=-held.choice.num_stages,
    )


def _data_near(held: Held) -> list[Near]:
    """What the stage before in backward still has on the device: its reduced gradient; and the one
    before that, while it goes down to an update on the host."""
    if not held.reduces:
        return []
    leaving = held.updates_on_host and not held.problem.updates_wait
    reduced = [0] * held.figures.num_layers if held.problem.updates_wait else held.reduced
    found = [Near(1, held.table(total(reduced, held.staging)))]
    return [*found, Near(2, held.table(held.reduced))] if leaving else found


def _state_near(
    held: Held, *, forward: bool = False, is_early: bool = False, at_end: bool = False
) -> list[Near]:
    """State of the stages around that has come from the host, or is on its way back."""
    if not held.choice.offload_state:
        return []
    buffers, found = num_buffers(held.choice), list[Near]()
    shards, away = held.table(held.shards), held.table(held.away)
    if held.gathers and forward:
        return [Near(distance, shards) for distance in range(1, buffers + 1)]
    if forward:
        return []
    if held.gathers:
        # Of the stages that are gathered again, until they are updated.
        # On the host: until the gather is over, which compute waits for.
        reach = range(-buffers - at_end, 1 - (at_end or held.updates_on_host))
        found = [Near(distance, shards, buffers) for distance in reach]
    if held.updates_on_host or (
        held.problem.updates_wait and (at_end or held.choice.stages_per_rank > 1)
    ):
        return found
    is_alone = held.choice.stages_per_rank == 1
    latest = 0 if is_alone else (1 if held.reduces else 0) - at_end
    # What the first update needs comes a few micro-batches ahead of it: see `_late_moment`.
    behind = 1 if is_early and held.choice.num_micro_batches > 2 * LOOKAHEAD else 0
    return [*found, Near(latest, away, behind), Near(latest + 1, away)]


def _early_near(held: Held) -> list[Near]:
    """Of the stage behind in backward, where there are few micro-batches: gradients that have come
    already, and stored inputs that it was too late to offload."""
    count, found = held.choice.num_micro_batches, []
    if count <= LOOKAHEAD and held.is_pipeline:
        early = held.crossings.gradients
        found.append(Near(-1, held.table(0, leave=early)))
        if count == 1:
            found.append(Near(-2, held.table(0, leave=early)))
    if count == 1 and held.choice.offload_inputs:
        found.append(Near(-1, held.table(0, entry=held.crossings.inputs)))
    return found


def _in_flight(held: Held) -> list[int]:
    """Per cut: stored inputs on their way to the host or back."""
    if not held.choice.offload_inputs:
        return [0] * (held.figures.num_layers + 1)
    return times(min(held.choice.num_micro_batches, 2 * LOOKAHEAD), held.crossings.inputs)


def _update_table(held: Held, entry: Layers, more: Layers | int = 0) -> Table:
    """What the optimizer makes while it updates a stage, and `more` of each layer.

    It grows with the largest parameter of the stage: of all layers, or of the first or last where
    the stage holds it.
    """
    problem, figures = held.problem, held.figures
    largest = parameters_of(figures, held.choice).largest_bytes
    slots = problem.update_slots_of_each + problem.update_slots_of_previous
    turn = [int(slots * num_bytes) for num_bytes in largest]
    inner = max(turn[1:-1], default=0)
    parts = per_shard(held.trainable, held.choice)
    layers = [int(problem.update_slots_of_all * num_bytes) for num_bytes in parts]
    layers[0] += max(0, turn[0] - inner)
    if len(turn) > 1:
        layers[-1] += max(0, turn[-1] - inner)
    if not isinstance(more, int):
        layers = total(layers, more)
    return held.table(layers, entry=[inner + num_bytes for num_bytes in entry])


def _forward_peaks(figures: Figures, elsewhere: Layers) -> list[int]:
    """Per cut: forward's peak in a stage that ends there, above all that it keeps of a micro-batch.

    A layer's peak stands on what earlier layers keep: what it and later ones keep is not there yet.
    """
    found, highest = [0], -(2**62)
    layers = zip(figures.forward_transient_bytes, figures.saved_bytes, strict=True)
    for (peak, saved), kept in zip(layers, elsewhere[1:], strict=True):
        highest = max(peak, highest) - saved
        found.append(max(0, highest + kept))
    return found


def _backward_peaks(figures: Figures, elsewhere: Layers) -> list[int]:
    """The same for backward, above what is kept when it begins; later layers' is gone by then."""
    found, highest = [0], -(2**62)
    layers = zip(figures.backward_transient_bytes, figures.saved_bytes, strict=True)
    for (peak, saved), kept in zip(layers, elsewhere[1:], strict=True):
        found.append(max(0, peak, highest - saved + kept))
        highest = max(peak, highest - saved)
    return found
