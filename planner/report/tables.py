"""Plans, solutions and verdicts as tables for the terminal.

This module knows rich's tables and what is worth a column. It does not print, and it computes
nothing that the plan or its simulation does not hold.
"""

from collections import Counter

from rich.table import Table

from planner.check import Report
from planner.partitions import partition_text
from planner.plan.types import Opcode, Plan
from planner.report.plain import plain_table
from planner.report.quantities import bytes_text, count_text, seconds_text
from planner.simulate import Simulation
from planner.solve.types import Candidate, Solution
from planner.words import counted

__all__ = [
    "candidate_table",
    "memory_table",
    "placement_table",
    "plan_lines",
    "program_counts",
    "rules_table",
    "solution_lines",
]  # fmt: skip

_MAX_CANDIDATES = 6


def plan_lines(plan: Plan) -> list[str]:
    """Model, cluster, mesh, batch and schedule, a line each."""
    elements = sum(parameter.num_elements for parameter in plan.parameters)
    return [
        f"model     {plan.model_name}: {counted(len(plan.layer_names), 'layer')}, "
        f"{count_text(elements)} parameters{_precision_words(plan)}",
        f"cluster   {plan.cluster.name}: {plan.cluster.provenance}",
        f"mesh      {counted(plan.num_replicas, 'replica')} x "
        f"{counted(plan.num_pipeline_ranks, 'pipeline rank')}, "
        f"{counted(plan.num_stages, 'stage')}{_layout_words(plan)}; {_state_words(plan)}",
        f"batch     {counted(plan.global_batch_size, 'sample')} = "
        f"{counted(plan.num_replicas, 'replica')} x "
        f"{counted(plan.num_micro_batches, 'micro-batch', 'es')} x "
        f"{counted(plan.micro_batch_size, 'sample')}",
        f"schedule  {plan.schedule}",
    ]


def _precision_words(plan: Plan) -> str:
    precision = plan.options.precision
    return f", computed in {precision.value} on float32 masters" if precision.is_mixed else ""


def _layout_words(plan: Plan) -> str:
    """Who shares hosts, where there are hosts to share and a choice."""
    hosts = {plan.cluster.host_index(rank) for rank in range(plan.world_size)}
    if len(hosts) == 1 or 1 in (plan.num_replicas, plan.num_pipeline_ranks):
        return ""
    return f", {plan.layout} hosts"


def placement_table(plan: Plan) -> Table:
    """A row per stage: where it runs, what it holds, what one micro-batch costs."""
    table = plain_table(
        "placement",
        ["stage", "rank", "layers", "recompute"],
        ["forward", "backward", "weights", "saved"],
    )
    sizes = {p.name: p.num_bytes for p in plan.parameters}
    units = {unit.name: sum(sizes[name] for name in unit.parameters) for unit in plan.units}
    for stage in plan.stages:
        first, last = stage.layers[0], stage.layers[-1]
        layers = first if first == last else f"{first} .. {last} ({len(stage.layers)})"
        table.add_row(
            str(stage.index),
            str(stage.rank),
            layers,
            "yes" if stage.recompute else "no",
            seconds_text(stage.forward_seconds),
            seconds_text(stage.backward_seconds),
            bytes_text(sum(units[name] for name in stage.units)),
            bytes_text(stage.saved_bytes),
        )
    return table


def memory_table(plan: Plan, simulation: Simulation) -> Table:
    """A row per pipeline rank: its worst moment by class, against the limit."""
    names = (
        "weights", "gradients", "optimizer", "stored_inputs", "activations", "buffers", "transient"
    )  # fmt: skip
    heads = ["weights", "gradients", "optimizer", "inputs", "saved", "buffers", "work"]
    title = "memory per device at its worst moment"
    table = plain_table(title, ["rank"], [*heads, "total", "limit"])
    for rank, moment in enumerate(simulation.memory):
        limit = plan.prediction.limit_of(rank) if plan.prediction else 0
        share = f"{moment.total_bytes / limit:.1%}" if limit else "-"
        parts = [bytes_text(getattr(moment, name)) for name in names]
        table.add_row(str(rank), *parts, bytes_text(moment.total_bytes), share)
    return table


def program_counts(plan: Plan) -> Table:
    """A row per pipeline rank: how many instructions of each kind."""
    used = {i.opcode for program in plan.programs for i in program}
    opcodes = [opcode for opcode in Opcode if opcode in used]
    table = plain_table("instructions per step", ["rank"], [opcode.value for opcode in opcodes])
    for rank, program in enumerate(plan.programs):
        counts = Counter(instruction.opcode for instruction in program)
        table.add_row(str(rank), *(str(counts[opcode]) for opcode in opcodes))
    return table


def solution_lines(solution: Solution) -> list[str]:
    """The solver's certificate, what it is of, and what simpler splits would cost."""
    lines = _certificate_lines(solution)
    if solution.is_interrupted:
        lines.insert(0, "stopped   the search was interrupted: this is the best plan so far")
    if not solution.bound_seconds:
        return lines
    if solution.traced_order_seconds is not None:
        traced = solution.traced_order_seconds
        lines.append(
            f"layers    in another order than traced, {solution.step_seconds / traced - 1:+.1%} "
            f"against the best plan in that ({seconds_text(traced)}), which objective and bound "
            "are of; they train bitwise alike"
        )
    own = solution.modular_seconds or solution.layered_seconds or solution.step_seconds
    for name, seconds in (
        ("uniform", solution.uniform_seconds), ("greedy", solution.greedy_seconds)
    ):  # fmt: skip
        if seconds is None:
            words = "does not fit in memory"
        else:
            words = f"{seconds_text(seconds)}, {seconds / own - 1:+.1%}"
        lines.append(f"{name:<9} split of the same mesh: {words}")
    return lines


def _certificate_lines(solution: Solution) -> list[str]:
    """Bound and gap of the plan, and those of the plans that the solver has a model of."""
    seconds, any_order = solution.step_seconds, solution.any_order_seconds
    solved = f"{seconds_text(solution.solve_seconds)} to solve"
    certificate = (
        f"objective {seconds_text(solution.objective_seconds)}, bound "
        f"{seconds_text(solution.bound_seconds)}, gap {solution.gap:.2%}"
    )
    if any_order is None:
        return [f"solver    {certificate}, {solved}"]
    lines = [
        f"solver    {seconds_text(seconds)}, bound of every schedule {seconds_text(any_order)}, "
        f"gap {max(0.0, 1 - any_order / seconds):.2%}, {solved}"
    ]
    others = {
        "layered": ("the best layered plan", solution.layered_seconds),
        "modular": ("the best with stage s on rank s mod P", solution.modular_seconds),
    }
    for name, (words, other) in others.items():
        if other is not None:
            lines.append(
                f"{name:<9} {words} takes {seconds_text(other)}, this one "
                f"{seconds / other - 1:+.1%}"
            )
    if len(lines) > 1:
        lines[-1] += f"; of that: {certificate}"
    return lines


def candidate_table(solution: Solution) -> Table:
    """The rejected choices that came nearest, and why each was rejected."""
    rejected = [candidate for candidate in solution.candidates if candidate.verdict != "best"]
    rejected.sort(key=_promise)
    table = plain_table(
        f"rejected: {len(rejected)} choices, the nearest first",
        [
            "mesh x loops", "batch", "partition", "recompute", "offload", "buffers", "bound",
            "simulated", "why",
        ],
    )  # fmt: skip
    for candidate in rejected[:_MAX_CANDIDATES]:
        step = candidate.step_seconds
        table.add_row(
            f"{candidate.num_replicas} x {candidate.num_pipeline_ranks} x "
            f"{candidate.stages_per_rank}",
            f"{candidate.num_micro_batches} x {candidate.micro_batch_size}",
            partition_text(candidate.partition, candidate.partition_group_size),
            _RECOMPUTES[candidate.recompute],
            _OFFLOADS[candidate.offload_state, candidate.offload_inputs],
            str(candidate.num_buffers),
            seconds_text(candidate.bound_seconds),
            "-" if step is None else seconds_text(step),
            _REASONS.get(candidate.verdict, candidate.verdict),
        )
    return table


def rules_table(report: Report) -> Table:
    """A row per rule."""
    table = plain_table("rules", ["", "what is proved", "verdict"])
    for verdict in report.verdicts:
        words = "[green]holds[/]" if verdict.passed else "[red]BROKEN[/]"
        table.add_row(
            str(verdict.number),
            verdict.title,
            words + (f" ({verdict.note})" if verdict.note else ""),
        )
    return table


_RECOMPUTES = {False: "no", True: "yes", None: "per stage"}
_OFFLOADS = {
    (False, False): "no", (True, False): "state", (False, True): "inputs", (True, True): "both",
}  # fmt: skip
"""By offload of state and of inputs."""
_REASONS = {
    "simulated": "no faster",
    "bounded": "bound is slower",
    "estimated": "estimate is slower",
}


def _promise(candidate: Candidate) -> tuple[bool, bool, float]:
    """Simulated ones first, infeasible ones last, and by time among themselves."""
    infeasible = candidate.verdict.startswith("infeasible")
    seconds = candidate.step_seconds or candidate.bound_seconds
    return infeasible, candidate.step_seconds is None, seconds


def _state_words(plan: Plan) -> str:
    if plan.num_replicas == 1:
        return "one replica holds the state"
    words, size = _STATES[plan.partition], plan.partition_group_size
    return f"{words} of groups of {size}, each with all of it" if size else words


_STATES = (
    "state on every replica",
    "optimizer state partitioned over replicas",
    "optimizer state and gradients partitioned over replicas",
    "state partitioned over replicas",
)
"""By level of partition."""
