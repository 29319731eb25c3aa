"""A rank that dies, stops or fails in the middle of a step: the others end and say which."""

import time
from pathlib import Path

import pytest
from plans import minimal_plan
from test_transport import Job

HEARTBEAT_SECONDS = 2.0
CULPRIT = "rank 1 (pipeline rank 0, replica 1)"


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("killed", "died or stopped: last seen"),
        ("killed_in_collective", "died or stopped: last seen"),
        pytest.param("stopped", "died or stopped: last seen", marks=pytest.mark.slow),
        pytest.param("exited", "sys.exit(3)", marks=pytest.mark.slow),
        ("failed", "ValueError: the loss is a teapot"),
    ],
)
def test_the_others_name_the_lost_rank(scenario: str, words: str, tmp_path: Path) -> None:
    deadline_seconds = 300.0
    plan = minimal_plan(
        1, 3, deadline_seconds=deadline_seconds, heartbeat_seconds=HEARTBEAT_SECONDS
    )
    job = Job(scenario, plan, tmp_path)
    start = time.monotonic()
    errors = job.end([0, 2])
    assert time.monotonic() - start < deadline_seconds / 5
    for rank, text in zip((0, 2), errors, strict=True):
        assert job.processes[rank].returncode == 1, text
        assert f"error: {CULPRIT}" in text
        assert f"; rank {rank} (pipeline rank 0, replica {rank}) ends with it" in text
        assert words in text
        assert "Traceback" not in text


def test_the_end_of_the_store_ends_the_ranks(tmp_path: Path) -> None:
    plan = minimal_plan(2, 1, deadline_seconds=60, heartbeat_seconds=HEARTBEAT_SECONDS)
    job = Job("silent_peer", plan, tmp_path)
    job.end_store_after(*(f"lga_meeting/0/1/0//lga_heartbeat/0/1/beat/{rank}" for rank in range(2)))
    for text in job.end():
        assert "the launcher died: the job's store" in text
