"""The benchmark for one GPU runs as a whole without one, and judges what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import TARGETS, problems, ratios_of  # noqa: E402
from gpu_measure import Found, Way, hidden_share  # noqa: E402

from planner.plan.types import Instruction, Opcode  # noqa: E402
from planner.timeline import Event, Timeline  # noqa: E402


def found(way: Way, *seconds: float, loss: float = 5.0, hidden: float | None = None) -> Found:
    return Found(way=way, seconds=seconds, loss=loss, hidden_copies=hidden)


def all_ways(*, layered: float = 1.0, in_memory: float = 1.0) -> list[Found]:
    return [
        found(Way.LAYERED, layered, layered, hidden=0.9),
        found(Way.PLAIN, 4.0, 4.2),
        found(Way.FSDP_SUMS_HERE, 2.5, 2.5),
        found(Way.FSDP_SUMS_AWAY, 9.0, 9.0),
        found(Way.IN_MEMORY, in_memory, in_memory),
        found(Way.BY_HAND, 0.98, 0.99),
    ]


def test_ratios_are_against_the_fastest_of_theirs() -> None:
    ratios = ratios_of(all_ways())
    assert ratios["layered over FSDP2"] == 2.5
    assert ratios["layered over plain order"] == pytest.approx(4.1)
    assert ratios["plan over back to back"] == pytest.approx(0.985)
    assert ratios["copies beside compute"] == 0.9
    assert problems(all_ways(), ratios) == []


def test_what_misses_its_target_or_did_not_run_is_named() -> None:
    slow = all_ways(layered=2.0, in_memory=1.1)
    wrong = problems(slow, ratios_of(slow))
    assert [each.split(":")[0] for each in wrong] == [
        "layered over FSDP2", "layered over plain order", "plan over back to back",
    ]  # fmt: skip
    some = [each for each in all_ways() if each.way is not Way.PLAIN]
    assert problems(some, ratios_of(some)) == ["layered over plain order: not measured"]
    other = [*all_ways()[1:], found(Way.LAYERED, 1.0, loss=6.0, hidden=0.9)]
    assert "first losses differ" in problems(other, ratios_of(other))[0]


def test_the_share_of_copies_beside_compute() -> None:
    spans = [
        (Opcode.FETCH, "copy.in", 0.0, 2.0),
        (Opcode.FORWARD, "compute", 1.0, 3.0),
        (Opcode.EVICT, "copy.out", 2.0, 4.0),
        (Opcode.FORWARD, "compute", 3.5, 5.0),
        (Opcode.GATHER, "data", 0.0, 9.0),
    ]
    program = [Instruction(opcode=opcode, stream=stream) for opcode, stream, _, _ in spans]
    events = tuple(
        Event(rank=0, index=i, start_seconds=start, end_seconds=end)
        for i, (_, _, start, end) in enumerate(spans)
    )
    timeline = Timeline(source="measured", events=events)
    assert hidden_share(program, timeline) == pytest.approx((1.0 + 1.5) / 4.0)
    assert hidden_share(program[1:2], Timeline(source="measured", events=events[:1])) == 0.0


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    words = ["--device", "cpu", "--small", "--rounds", "1", "--steps", "1", "--json", str(path)]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert len(figures["found"]) == len(Way)
    assert all(len(each["seconds"]) == 1 for each in figures["found"]), figures
    assert figures["ratios"].keys() == TARGETS.keys()
    assert "first losses differ" not in done.stdout
