"""The timeline file and the trace: what was written comes back, and a viewer can draw it."""

import contextlib
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_torch_pipelining import plan_of

from planner.check.table import instruction_label
from planner.errors import UsageError
from planner.export.chrome import chrome_trace, event_name
from planner.export.timeline_file import (
    parse_timeline,
    plan_digest,
    print_timeline,
    read_timeline,
    write_timeline,
)
from planner.plan.text import parse_instruction
from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule
from planner.simulate import memory_over_time, simulate
from planner.timeline import Event, Timeline

PLAN = plan_of(Schedule.LAYERED, 2, 4, 3, num_replicas=2)
PLANNED = simulate(PLAN).timeline


def later(timeline: Timeline, seconds: float, source: str = "measured") -> Timeline:
    return Timeline(
        source=source,
        events=tuple(
            replace(
                event,
                start_seconds=event.start_seconds + seconds,
                end_seconds=event.end_seconds + seconds,
            )
            for event in timeline.events
        ),
    )


def changed(**values: Any) -> str:
    return json.dumps(json.loads(print_timeline(PLAN, PLANNED)) | values)


def with_row(number: int, row: list[Any]) -> str:
    rows = json.loads(print_timeline(PLAN, PLANNED))["rows"]
    return changed(rows=[*rows[:number], row, *rows[number + 1 :]])


def test_a_timeline_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    measured = later(PLANNED, 1 / 3)
    write_timeline(PLAN, measured, path)
    assert read_timeline(path, PLAN) == measured
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]
    assert len(path.read_text().splitlines()) == len(measured.events) + 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no timeline"),
        ("[]", "is no timeline"),
        ("{}, {}", "is no timeline"),
        (print_timeline(PLAN, PLANNED)[:-40], "is no timeline"),
        (changed(format="lga timeline 9"), "has the format 'lga timeline 9'"),
        (changed(columns=["rank"]), "with columns rank"),
        (changed(more=1), "is no timeline"),
        (changed(rows=[]), "has 0 events of pipeline rank 0"),
        (changed(rows=3), "is no timeline"),
        (with_row(3, [0, 3, 1.0]), "row 3 is no event"),
        (with_row(3, [0.5, 3, 1.0, 2.0]), "row 3 is no event"),
        (with_row(3, [0, 3, "a", 2.0]), "is no timeline"),
        (with_row(3, [0, 3, 2.0, 1.0]), "row 3 starts at 2.0 s and ends at 1.0 s"),
        (with_row(3, [0, 3, -1.0, 1.0]), "row 3 starts at -1.0 s"),
        (with_row(3, [0, 3, 1.0, 1e300]), "row 3 starts at 1.0 s and ends at 1e[+]300 s"),
        (with_row(3, [0, 3, 1.0, 10**400]), "row 3 starts at 1.0 s"),
        (with_row(3, [0, 2, 1.0, 2.0]), "no event, or two, before instruction 2"),
        (with_row(3, [7, 0, 1.0, 2.0]), "instruction 0 of pipeline rank 7"),
        (with_row(3, [0, 3, 1.0, float("nan")]), "is no timeline"),
        (with_row(3, [0, 3, 1.0, float("inf")]), "is no timeline"),
    ],
)
def test_what_is_no_timeline_of_the_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_timeline(text, PLAN)


@given(st.data())
def test_a_damaged_file_is_refused_or_still_one_of_the_plan(data: st.DataObject) -> None:
    text = print_timeline(PLAN, PLANNED)
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 20))
    inserted = data.draw(st.text('0123456789.e-+,[]{}" \nNaInfty', max_size=6))
    damaged = text[:place] + inserted + text[place + length :]
    with contextlib.suppress(UsageError):
        found = parse_timeline(damaged, PLAN)
        assert len(found.events) == len(PLANNED.events)


def test_a_timeline_of_another_plan_is_refused() -> None:
    text = print_timeline(PLAN, PLANNED)
    longer = plan_of(Schedule.LAYERED, 2, 4, 4, num_replicas=2)
    with pytest.raises(UsageError, match=r"has \d+ events of pipeline rank 0, but the plan has"):
        parse_timeline(text, longer)
    larger = replace(PLAN, micro_batch_size=2)
    with pytest.raises(UsageError, match="timeline of another plan"):
        parse_timeline(text, larger)
    seeded = replace(PLAN, options=replace(PLAN.options, seed=5, deadline_seconds=1.0))
    assert plan_digest(seeded) == plan_digest(PLAN)


@pytest.mark.parametrize("fault", ["missing", "folder", "binary"])
def test_files_that_cannot_be_read_are_named(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    if fault == "folder":
        path.mkdir()
    if fault == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"step\.json") as caught:
        read_timeline(path, PLAN)
    assert "lga-run --timeline" in caught.value.hint


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_timeline(PLAN, PLANNED, tmp_path / "nowhere" / "step.json")


def traced(plan: Plan, *timelines: Timeline, **more: Any) -> dict[str, list[dict[str, Any]]]:
    """Events of the trace by phase."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(chrome_trace(plan, timelines, **more))["traceEvents"]:
        found[event["ph"]].append(event)
    return found


def test_every_instruction_is_a_slice_on_its_stream() -> None:
    events = traced(PLAN, PLANNED)
    assert len(events["X"]) == sum(map(len, PLAN.programs))
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events["M"] if e["name"] == "thread_name"
    }
    for slice_, event in zip(events["X"], PLANNED.events, strict=True):
        instruction = PLAN.programs[event.rank][event.index]
        assert threads[slice_["pid"], slice_["tid"]] == instruction.stream
        assert slice_["name"] == event_name(instruction)
        assert slice_["ts"] == pytest.approx(event.start_seconds * 1e6)
        assert slice_["ts"] + slice_["dur"] == pytest.approx(event.end_seconds * 1e6)
        assert slice_["args"]["reads"].split() == list(instruction.reads)
        assert slice_["args"].get("peer") == instruction.peer
    names = {slice_["name"] for slice_ in events["X"]}
    assert {"F 3.1", "B 0.2", "SEND h_0.1", "RECEIVE gradient:h_2.0", "GATHER stage.1"} <= names


def test_no_process_or_thread_is_number_0() -> None:
    """Perfetto keeps 0 for the idle task: it renames such a thread, or merges it with thread 1."""
    for events in traced(PLAN, PLANNED, memory=memory_over_time(PLAN, PLANNED)).values():
        assert all(event["pid"] > 0 and event["tid"] > 0 for event in events)


def test_what_comes_and_goes_under_a_unit_is_named() -> None:
    instructions = [
        parse_instruction(line)
        for line in (
            "copy.in FETCH unit stage.0 : host:shard:stage.0 -> shard:stage.0",
            "copy.in FETCH unit stage.0 : host:moments:stage.0 -> moments:stage.0",
            "copy.out EVICT unit stage.0 : shard:stage.0 -> host:shard:stage.0",
            "compute RELEASE unit stage.0 : shard:stage.0 -> shard:stage.0",
            "compute RELEASE unit stage.0 : weights:float32.1 -> weights:float32.1",
            "compute RELEASE micro_batch 1 : h_0.1 -> h_0.1",
            "data CLIP : sum:stage.0 -> scale",
        )
    ]
    assert [event_name(instruction) for instruction in instructions] == [
        "FETCH shard:stage.0", "FETCH moments:stage.0", "EVICT shard:stage.0",
        "RELEASE shard:stage.0", "RELEASE stage.0", "RELEASE h_0.1", "CLIP scale",
    ]  # fmt: skip
    assert [instruction_label(instruction) for instruction in instructions[3:]] == [
        "RELEASE shard:stage.0", "RELEASE stage.0 from weights:float32.1", "RELEASE h_0.1", "CLIP",
    ]  # fmt: skip


def test_slices_of_a_stream_do_not_overlap() -> None:
    """Or the viewer would draw them inside each other."""
    lanes = defaultdict(list)
    for slice_ in traced(PLAN, PLANNED, later(PLANNED, 0.5))["X"]:
        lanes[slice_["pid"], slice_["tid"]].append((slice_["ts"], slice_["ts"] + slice_["dur"]))
    assert len(lanes) > 8
    for spans in lanes.values():
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert round(start * 1000) >= round(end * 1000)


def test_planned_and_measured_ranks_stand_next_to_each_other() -> None:
    events = traced(PLAN, PLANNED, later(PLANNED, 0.5))["M"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    places = {
        e["args"]["sort_index"]: e["pid"] for e in events if e["name"].startswith("process_s")
    }
    assert [names[places[place]] for place in sorted(places)] == [
        "rank 0 planned", "rank 0 measured", "rank 1 planned", "rank 1 measured"
    ]  # fmt: skip


def arrows(events: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, float, float]]:
    """(slice it leaves, slice it enters, times) of each arrow, by what lies under its ends."""
    starts = {e["id"]: e for e in events["s"]}
    ends = {e["id"]: e for e in events["f"]}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(events["s"])

    def under(arrow: dict[str, Any]) -> str:
        lane = [e for e in events["X"] if (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])]
        begun = [e for e in reversed(lane) if e["ts"] <= arrow["ts"]]
        found = max(begun, key=lambda e: float(e["ts"]))
        assert arrow["ts"] <= found["ts"] + found["dur"]
        return str(found["name"])

    return [(under(starts[i]), under(ends[i]), starts[i]["ts"], ends[i]["ts"]) for i in starts]


def test_arrows_join_each_send_with_its_receive() -> None:
    events = traced(PLAN, PLANNED)
    found = arrows(events)
    num_sends = sum(i.opcode is Opcode.SEND for program in PLAN.programs for i in program)
    assert len(found) == num_sends
    for source, target, start, end in found:
        assert source.replace("SEND", "RECEIVE") == target
        assert start <= end


def test_an_arrow_ends_where_the_tensor_is_used_if_the_receive_was_only_posted() -> None:
    """As measured: a RECEIVE returns at once, long before its SEND."""
    posted = Timeline(
        source="measured",
        events=tuple(
            Event(rank=event.rank, index=event.index, start_seconds=0.0, end_seconds=0.0)
            if PLAN.programs[event.rank][event.index].opcode is Opcode.RECEIVE
            else event
            for event in PLANNED.events
        ),
    )
    for source, target, start, end in arrows(traced(PLAN, posted)):
        assert start <= end
        if start > 0:
            assert source.startswith("SEND ")
            assert target[0] in "FB"


def test_memory_is_a_counter_of_the_planned_ranks() -> None:
    memory = memory_over_time(PLAN, PLANNED)
    counters = traced(PLAN, PLANNED, later(PLANNED, 0.5), memory=memory)["C"]
    for rank, held in enumerate(memory):
        mine = [e for e in counters if e["pid"] == 2 * rank + 1]
        assert [e["ts"] for e in mine] == pytest.approx([s * 1e6 for s in held.seconds])
        assert max(sum(e["args"].values()) for e in mine) == held.peak.total_bytes > 0
    assert len(counters) == sum(len(held.seconds) for held in memory)
