"""Plans written by hand as text, to simulate exactly what a test wants to see."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from plans import minimal_plan
from synthetic import chain_cluster

from planner.cluster.types import Cluster
from planner.graph import TensorSpec
from planner.plan.names import buffer_key
from planner.plan.text import parse_program
from planner.plan.types import Buffer, Opcode, Plan, StagePlan, Unit
from planner.simulate import Simulation

__all__ = ["made_plan", "spans"]


def made_plan(
    *programs: str,
    cluster: Cluster | None = None,
    num_replicas: int = 1,
    sizes: Mapping[str, int] | None = None,
    units: Sequence[Unit] = (),
    forward_seconds: Sequence[float] = (),
    backward_seconds: float = 2.0,
    partition: int = 0,
) -> Plan:
    """One program of text lines per rank.

    `sizes` are bytes of buffers by their names without a micro-batch, 4 where absent; stage s is
    on rank 0 and takes `forward_seconds[s]`.
    """
    parsed = tuple(parse_program(_lines(text)) for text in programs)
    known = dict(sizes or {})
    tables = []
    for program in parsed:
        names = {buffer_key(b) for i in program for b in (*i.reads, *i.writes)}
        tables.append(
            tuple(
                Buffer(name=name, dtype="uint8", shape=(known.get(name, 4),))
                for name in sorted(names)
            )
        )
    moved = {
        buffer_key(i.reads[0]).removeprefix("gradient:")
        for program in parsed
        for i in program
        if i.opcode is Opcode.SEND
    }
    return replace(
        minimal_plan(len(programs), num_replicas),
        cluster=cluster or chain_cluster(len(programs) * num_replicas),
        partition=partition,
        programs=parsed,
        buffers=tuple(tables),
        units=tuple(units),
        stages=tuple(
            _stage(s, seconds, backward_seconds) for s, seconds in enumerate(forward_seconds)
        ),
        tensors=tuple(
            TensorSpec(
                name=name,
                shape=(known.get(name, 4),),
                stride=(1,),
                dtype="uint8",
                requires_grad=True,
            )
            for name in sorted(moved)
        ),
    )


def _lines(text: str) -> str:
    return "".join(line.strip() + "\n" for line in text.strip().splitlines() if line.strip())


def _stage(index: int, forward_seconds: float, backward_seconds: float) -> StagePlan:
    return StagePlan(
        index=index,
        rank=0,
        layers=(),
        recompute=False,
        code=(),
        inputs=(),
        outputs=(),
        batch_keys=(),
        units=(),
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        backward_weight_seconds=backward_seconds / 4,
    )


def spans(plan: Plan, simulation: Simulation, rank: int = 0) -> list[tuple[str, float, float]]:
    """(opcode, start, end) of a rank's instructions."""
    return [
        (plan.programs[rank][event.index].opcode.value, event.start_seconds, event.end_seconds)
        for event in simulation.timeline.events
        if event.rank == rank
    ]
