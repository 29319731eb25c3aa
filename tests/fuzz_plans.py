"""Reads corrupted plan files, one per seed, and reports what came of each; its own process.

    python tests/fuzz_plans.py FIRST_SEED NUMBER

Prints one JSON object: how many ended how, the failures (seed, corruption, traceback), and the
most memory the process ever held. Repeat a failure with its seed and NUMBER 1.
"""

import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan_corruptions import corrupted_bytes, corrupted_text, corrupted_values
from synthetic import chain_plan

from planner.check import check
from planner.errors import LgaError, PlanFileError
from planner.plan.file import parse_plan, print_plan, read_plan
from planner.plan.types import Plan, PlanOptions, Prediction
from planner.schedules import Schedule
from planner.simulate import simulate

LIMIT_SECONDS = 20
ADDRESS_SPACE_BYTES = 2 * 10**9
"""Far beyond what is measured: it keeps a failure from taking the whole machine."""
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.remove",
    "os.rename", "subprocess.Popen", "socket.connect", "pickle.find_class", "ctypes.dlopen",
    "shutil.rmtree",
)  # fmt: skip


class TooSlowError(Exception):
    """Reading, checking and simulating one file took longer than LIMIT_SECONDS."""


class Watch:
    """Notes what the interpreter reports while it is on: programs started, files written."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and (
            any(letter in str(arguments[1]) for letter in "wax+")
            or bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        # Libraries run their own code: modules imported late, networkx's decorators.
        file = getattr(arguments[0], "co_filename", "") if event == "exec" else sys.prefix
        runs = not file.startswith(("<class 'networkx.", "<frozen", sys.prefix, sys.base_prefix))
        if event in FORBIDDEN or writes or runs:
            self.seen.append(f"{event}{arguments!r}"[:200])

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False


def base_plans() -> list[Plan]:
    """Small plans that between them hold every kind of section, opcode and buffer."""
    full = PlanOptions(check_finite=True, clip_norm=1.0, save=True)
    prediction = Prediction(
        step_seconds=1.5, bubble=0.25, peak_bytes=(1, 2), memory_limit_bytes=9, provenance="é\n x"
    )
    plans = [
        chain_plan(4, 2, 3, tied=[(0, 3)], num_random_operators=2),
        chain_plan(4, 2, 2, num_replicas=2, partition=3, recompute=True, options=full),
        chain_plan(4, 2, 2, num_replicas=2, partition=3, offload_state=True, options=full),
        chain_plan(3, 1, 2, offload_state=True, options=replace(full, update_on_host=True)),
        chain_plan(2, 2, 4, schedule=Schedule.ZERO_BUBBLE),
        chain_plan(1, 1, 1),
    ]
    return [replace(plans[0], prediction=prediction), *plans[1:]]


def corruption(texts: list[str], seed: int) -> tuple[str, int, bytes]:
    """The kind of corruption, which plan it hits, and the file it makes."""
    dice = random.Random(seed)
    which = dice.randrange(len(texts))
    kind = dice.choice(("bytes", "bytes", "text", "text", "values", "values", "values"))
    if kind == "bytes":
        return kind, which, corrupted_bytes(texts[which].encode(), dice)
    spoil = corrupted_text if kind == "text" else corrupted_values
    return kind, which, spoil(texts[which], dice).encode()


def outcome(path: Path, kind: str, original: Plan) -> str:
    """How one file ends; anything but the words returned here is an exception."""
    try:
        plan = read_plan(path)
    except PlanFileError as error:
        return "refused" if error.message and error.hint and error.exit_code == 2 else "unclear"
    if plan == original:
        return "unchanged"
    assert kind != "bytes", "a file changed behind its checksums was read as another plan"
    assert parse_plan(print_plan(plan)) == plan, "the plan changes when it is written and read"
    ends = []
    for judge in (check, simulate):
        try:
            ends.append(
                judge.__name__ + (" passed" if getattr(judge(plan), "passed", True) else " failed")
            )
        except LgaError as error:
            ends.append(f"{judge.__name__} {type(error).__name__}")
    return ", ".join(ends)


def too_slow(*_: object) -> None:
    raise TooSlowError


def main(first_seed: int, number: int) -> None:
    plans = base_plans()
    texts = [print_plan(plan) for plan in plans]
    watch, counts, failures = Watch(), Counter[str](), []
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        path = Path("plan.yaml")
        for original, text in zip(plans, texts, strict=True):  # imports what is imported late
            path.write_text(text)
            assert outcome(path, "bytes", original) == "unchanged"
            check(original), simulate(original)
        with watch.watching():
            sys.audit("os.system", "a canary")
            exec("canary = 1")
        assert len(watch.seen) == 2, "the watch does not see"
        watch.seen.clear()
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        slowest_seconds = 0.0
        for seed in range(first_seed, first_seed + number):
            kind, which, content = corruption(texts, seed)
            path.write_bytes(content)
            start = time.perf_counter()
            signal.alarm(LIMIT_SECONDS)
            try:
                with watch.watching():
                    end = outcome(path, kind, plans[which])
                assert not watch.seen, f"reading it did {watch.seen}"
                assert os.listdir() == ["plan.yaml"]
            except BaseException:
                end = "traceback"
                failures.append(
                    {
                        "seed": seed,
                        "kind": kind,
                        "plan": which,
                        "error": traceback.format_exc()[-3000:],
                    }
                )
                watch.seen.clear()
            signal.alarm(0)
            slowest_seconds = max(slowest_seconds, time.perf_counter() - start)
            counts[f"{kind}: {end}"] += 1
        os.chdir("/")
    # Of this process alone: getrusage would count the one that started it.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    peak_bytes = int(peak[1]) * 1024
    print(
        json.dumps(
            {
                "counts": dict(sorted(counts.items())),
                "failures": failures,
                "peak_bytes": peak_bytes,
                "slowest_seconds": slowest_seconds,
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
