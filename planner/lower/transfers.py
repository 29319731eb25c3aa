"""SEND and RECEIVE of boundary tensors and their gradients.

A SEND follows the compute that makes (or relays) its tensor. Its RECEIVE is issued a few compute
steps before the reader, so that no ready compute waits behind a pending transfer. Messages of an
ordered pair of ranks are received in the order in which they are sent. So nothing but data holds
up a rank, and an order of compute that can run to its end still does with its transfers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.lower.routes import Route
from planner.lower.slots import LOOKAHEAD, BufferNames, Slots
from planner.plan.names import stream_of
from planner.plan.types import Instruction, Opcode
from planner.schedule import Order

__all__ = ["place_transfers"]

_Steps = dict[tuple[int, int], int]
"""(stage, micro-batch) -> index among its rank's compute steps."""


@dataclass(slots=True, kw_only=True)
class _Message:
    buffer: str
    stage: int
    """Reader stage of the tensor, or the stage that takes the gradient."""
    micro_batch: int
    sent_behind: int
    """Index of the sending rank's compute step."""
    read_by: int
    """Index of the receiving rank's compute step."""
    returns: bool
    """Whether the receiving rank has sent the buffer away before."""


def place_transfers(
    ranks: Sequence[Slots], order: Order, routes: Iterable[Route], names: BufferNames
) -> list[set[str]]:
    """SENDs and RECEIVEs of every rank; the buffers that each sends."""
    forward, backward = _step_indices(order)
    pairs: dict[tuple[int, int], list[_Message]] = {}
    for route in routes:
        _add_hops(pairs, route, names[route.tensor], forward, route.forward_hops())
        if backward:
            buffers = names[f"gradient:{route.tensor}"]
            _add_hops(pairs, route, buffers, backward, route.backward_hops())
    sent: list[set[str]] = [set() for _ in ranks]
    for (source, destination), messages in pairs.items():
        messages.sort(key=lambda message: message.sent_behind)
        for message, step in zip(messages, _receive_steps(messages), strict=True):
            instruction = _transfer(Opcode.RECEIVE, message, source)
            ranks[destination].before(step, instruction)
            sent[source].add(message.buffer)
            ranks[source].behind(message.sent_behind, _transfer(Opcode.SEND, message, destination))
    return sent


def _step_indices(order: Order) -> tuple[_Steps, _Steps]:
    """Where each (stage, micro-batch) runs forward, and backward to its inputs."""
    forward: _Steps = {}
    backward: _Steps = {}
    for steps in order.ranks:
        for index, step in enumerate(steps):
            if step.opcode is Opcode.FORWARD:
                forward[step.stage, step.micro_batch] = index
            elif step.opcode in (Opcode.BACKWARD, Opcode.BACKWARD_INPUT):
                backward[step.stage, step.micro_batch] = index
    return forward, backward


def _add_hops(
    pairs: dict[tuple[int, int], list[_Message]],
    route: Route,
    buffers: Sequence[str],
    steps: _Steps,
    hops: Iterable[tuple[int, int]],
) -> None:
    """The messages of one direction of a route, by (sending, receiving) rank."""
    senders: set[int] = set()
    for position, following in hops:
        source, destination = route.ranks[position], route.ranks[following]
        maker, reader = route.chain[position], route.chain[following]
        senders.add(source)
        pairs.setdefault((source, destination), []).extend(
            [
                _Message(
                    buffer=buffer,
                    stage=reader,
                    micro_batch=micro_batch,
                    sent_behind=steps[maker, micro_batch],
                    read_by=steps[reader, micro_batch],
                    returns=destination in senders,
                )
                for micro_batch, buffer in enumerate(buffers)
            ]
        )


def _receive_steps(messages: Sequence[_Message]) -> list[int]:
    """Compute step before which each message of a pair is received, in the order of sending.

    Nothing is received before what was sent earlier. A gradient that passes through its rank more
    than once comes back into the buffer that it was sent from, and its RECEIVE holds up the rank
    until that SEND is over; so it has no look-ahead: right before its reader, where all that it
    waits for lies behind the rank.
    """
    steps: list[int] = []
    reader = step = messages[-1].read_by
    for message in reversed(messages):
        reader = min(reader, message.read_by)
        step = min(step, max(0, message.read_by - LOOKAHEAD))
        steps.append(reader if message.returns else step)
    steps.reverse()
    for index in range(1, len(steps)):
        steps[index] = max(steps[index], steps[index - 1])
    return steps


def _transfer(opcode: Opcode, message: _Message, peer: int) -> Instruction:
    buffer = (message.buffer,)
    sends = opcode is Opcode.SEND
    return Instruction(
        opcode=opcode,
        stream=stream_of(opcode, peer),
        stage=message.stage,
        micro_batch=message.micro_batch,
        peer=peer,
        reads=buffer if sends else (),
        writes=() if sends else buffer,
    )
