"""SEND and RECEIVE of boundary tensors and their gradients.

A SEND follows the compute that makes (or relays) its tensor. Its RECEIVE is issued a few compute
steps before the reader, so that no ready compute waits behind a pending transfer. Messages of an
ordered pair of ranks are received in the order in which they are sent.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.lower.data import Placed
from planner.lower.routes import Route
from planner.plan.types import Instruction, Opcode
from planner.schedule import Order

__all__ = ["RECEIVE_LOOKAHEAD", "transfer_instructions"]

RECEIVE_LOOKAHEAD = 2
"""Compute steps between the issue of a RECEIVE and its reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    buffer: str
    stage: int
    """Reader stage of the tensor, or the stage that takes the gradient."""
    micro_batch: int
    source: int
    destination: int
    sent_after: int
    """Index of the sending rank's compute step."""
    read_by: int
    """Index of the receiving rank's compute step."""


def transfer_instructions(
    order: Order, routes: Sequence[Route], num_micro_batches: int
) -> list[list[Placed]]:
    """SENDs and RECEIVEs of every rank."""
    placed: list[list[Placed]] = [[] for _ in order.ranks]
    pairs: dict[tuple[int, int], list[_Message]] = {}
    sent_away: dict[tuple[int, str], list[int]] = {}
    for message in _messages(order, routes, num_micro_batches):
        pairs.setdefault((message.source, message.destination), []).append(message)
        sent_away.setdefault((message.source, message.buffer), []).append(message.sent_after)
    for messages in pairs.values():
        messages.sort(key=lambda message: message.sent_after)
        for message, step in zip(messages, _receive_steps(messages, sent_away), strict=True):
            placed[message.destination].append(_receive(message, step))
        for message in messages:
            placed[message.source].append(_send(message))
    return placed


def _receive_steps(
    messages: Sequence[_Message], sent_away: Mapping[tuple[int, str], Sequence[int]]
) -> list[int]:
    """Compute step before which each message of a pair is received, in the order of sending.

    Nothing is received before what was sent earlier. A gradient that passes through its rank more
    than once comes back into the buffer that it was sent from, so it is not received before that.
    """
    latest: list[int] = []
    step = messages[-1].read_by
    for message in reversed(messages):
        step = min(step, max(0, message.read_by - RECEIVE_LOOKAHEAD))
        latest.append(step)
    steps, free = [], 0
    for message, step in zip(messages, reversed(latest), strict=True):
        sent = sent_away.get((message.destination, message.buffer), ())
        free = max(free, *(s + 1 for s in sent if s < message.read_by), 0)
        steps.append(max(step, free))
    return steps


def _messages(order: Order, routes: Sequence[Route], num_micro_batches: int) -> list[_Message]:
    forward, backward = _step_indices(order)
    messages = []
    for route in routes:
        directions = (
            ("", forward, route.forward_hops()),
            ("gradient:", backward, route.backward_hops()),
        )
        for prefix, steps, hops in directions:
            for (source, destination), micro_batch in itertools.product(
                hops, range(num_micro_batches)
            ):
                reader = route.chain[destination]
                messages.append(
                    _Message(
                        buffer=f"{prefix}{route.tensor}.{micro_batch}",
                        stage=reader,
                        micro_batch=micro_batch,
                        source=route.ranks[source],
                        destination=route.ranks[destination],
                        sent_after=steps[route.chain[source], micro_batch],
                        read_by=steps[reader, micro_batch],
                    )
                )
    return messages


def _step_indices(
    order: Order,
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Index, in its rank's steps, of each (stage, micro-batch)'s FORWARD and BACKWARD."""
    found: dict[Opcode, dict[tuple[int, int], int]] = {op: {} for op in Opcode}
    for steps in order.ranks:
        for index, step in enumerate(steps):
            found[step.opcode][step.stage, step.micro_batch] = index
    return found[Opcode.FORWARD], found[Opcode.BACKWARD]


def _send(message: _Message) -> Placed:
    instruction = Instruction(
        opcode=Opcode.SEND,
        stream=f"to.{message.destination}",
        stage=message.stage,
        micro_batch=message.micro_batch,
        peer=message.destination,
        reads=(message.buffer,),
    )
    return Placed(step=message.sent_after, after=True, instruction=instruction)


def _receive(message: _Message, step: int) -> Placed:
    instruction = Instruction(
        opcode=Opcode.RECEIVE,
        stream=f"from.{message.source}",
        stage=message.stage,
        micro_batch=message.micro_batch,
        peer=message.source,
        writes=(message.buffer,),
    )
    return Placed(step=step, after=False, instruction=instruction)
