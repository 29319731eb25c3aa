"""The compute instructions of a stage: which buffers FORWARD, RECOMPUTE and BACKWARD name.

Weights and gradient sums may change buffers from step to step: they are filled in per step. All
other operands differ by micro-batch alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.lower.gradients import Operands
from planner.lower.routes import Route
from planner.lower.slots import BufferNames, Slots
from planner.lower.work import RankWork
from planner.plan.types import Instruction, Opcode, StagePlan

__all__ = ["Template", "compute_instructions", "place_loads", "stage_templates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Operands of one instruction of a stage, each a list of names by micro-batch."""

    reads: tuple[list[str], ...]
    """Before the weights."""
    gradients: tuple[list[str], ...]
    """Read behind the weights."""
    writes: tuple[list[str], ...]


def stage_templates(
    stage: StagePlan, routes: Mapping[str, Route], names: BufferNames, *, saves: bool
) -> dict[Opcode, Template]:
    """The templates of one stage; `saves` is false where no backward follows."""
    batch = [f"batch:{key}" for key in stage.batch_keys]
    inputs, saved = [*stage.inputs, *batch], f"saved:{stage.index}"
    made_again = stage.outputs if stage.recompute else ()
    kept = [
        saved,
        *(f"batch:{n}" if n in stage.batch_keys else n for n in stage.kept if n not in made_again),
    ]
    back = [n for n in stage.inputs if routes[n].requires_grad]
    made = [n for n in stage.outputs if n != "loss" and routes[n].requires_grad]
    passed = [n for n in back if stage.index != routes[n].chain[-1]]
    forward = [*stage.outputs, *([saved] if saves and not stage.recompute else [])]

    def template(reads: list[str], gradients: list[str], writes: list[str]) -> Template:
        return Template(
            reads=tuple([names[name] for name in reads]),
            gradients=tuple([names[f"gradient:{name}"] for name in gradients]),
            writes=tuple([names[name] for name in writes]),
        )

    to_inputs = [f"gradient:{name}" for name in back]
    return {
        Opcode.FORWARD: template(inputs, [], forward),
        Opcode.RECOMPUTE: template(inputs, [], [saved]),
        Opcode.BACKWARD: template(kept, [*made, *passed], to_inputs),
        Opcode.BACKWARD_INPUT: template(kept, [*made, *passed], to_inputs),
        Opcode.BACKWARD_WEIGHT: template(kept, made, []),
    }


_NOTHING = Operands()


def compute_instructions(
    work: RankWork,
    templates: Sequence[Mapping[Opcode, Template]],
    weights: Sequence[tuple[str, ...]],
    sums: Mapping[int, Operands],
) -> list[Instruction]:
    """One instruction per step; `templates` by stage, `weights` and `sums` by step."""
    found = []
    for index, step in enumerate(work.steps):
        template, m = templates[step.stage][step.opcode], step.micro_batch
        gradients = sums.get(index, _NOTHING)
        found.append(
            Instruction(
                opcode=step.opcode,
                stream="compute",
                stage=step.stage,
                micro_batch=m,
                reads=(
                    *[name[m] for name in template.reads],
                    *weights[index],
                    *[name[m] for name in template.gradients],
                    *gradients.reads,
                ),
                writes=(*[name[m] for name in template.writes], *gradients.writes),
            )
        )
    return found


def place_loads(
    slots: Slots, work: RankWork, stages: Sequence[StagePlan], names: BufferNames
) -> None:
    """LOAD, before the first step that needs them, of keys that the rank has not loaded yet."""
    loaded: set[str] = set()
    for index, step in enumerate(work.steps):
        keys = stages[step.stage].batch_keys
        if not keys or step.opcode is not Opcode.FORWARD:
            continue
        buffers = [names[f"batch:{key}"][step.micro_batch] for key in keys]
        fresh = tuple([buffer for buffer in buffers if buffer not in loaded])
        if fresh:
            loaded.update(fresh)
            load = Instruction(
                opcode=Opcode.LOAD,
                stream="copy.in",
                stage=step.stage,
                micro_batch=step.micro_batch,
                writes=fresh,
            )
            slots.before(index, load)
