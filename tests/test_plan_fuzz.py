"""Corrupted plan files: a clear refusal or the same plan; never a traceback, a run, or a gigabyte.

The corruptions are those of `plan_corruptions`, the process that reads them is `fuzz_plans`.
"""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from plan_corruptions import STATEMENTS, YAML_TEXTS, corrupted_bytes, corrupted_values, sealed
from synthetic import chain_plan

from planner.cli.check import main as check_command
from planner.errors import PlanFileError
from planner.plan.file import parse_plan, print_plan

MOST_MEMORY_BYTES = 10**9


def fuzz(first_seed: int, number: int) -> dict[str, int]:
    """How the corruptions ended, after the process has been found without fault."""
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz_plans.py"), str(first_seed), str(number)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout)
    failures = result["failures"]
    print(json.dumps(result["counts"], indent=1), result["peak_bytes"], result["slowest_seconds"])
    assert not any("unclear" in word for word in result["counts"])
    assert not failures, f"{len(failures)} failures; the first: {json.dumps(failures[0], indent=1)}"
    assert result["peak_bytes"] < MOST_MEMORY_BYTES
    assert sum(result["counts"].values()) == number
    counts: dict[str, int] = result["counts"]
    return counts


def test_corrupted_files_are_refused_or_judged() -> None:
    counts = fuzz(0, 1_500)
    # That every layer was reached: the seal, the sections and values, the rules.
    for word in ("bytes: refused", "bytes: unchanged", "text: refused", "values: refused"):
        assert counts[word] > 0
    assert any("check failed" in word for word in counts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_corruptions() -> None:
    fuzz(1_000_000, 10_000)


@pytest.mark.parametrize("evil", YAML_TEXTS)
def test_evil_yaml_behind_the_seal_is_refused_or_text(evil: str) -> None:
    plan = chain_plan(2, 1, 1)
    text = print_plan(plan)
    spoilt = sealed(text.replace("fingerprint: chain-2-1", f"fingerprint: {evil}", 1))
    assert spoilt != text
    try:
        read = parse_plan(spoilt)
    except PlanFileError:
        return
    assert re.fullmatch("[a-z ]*", read.fingerprint)
    assert replace(read, fingerprint=plan.fingerprint) == plan


@pytest.mark.parametrize("evil", STATEMENTS)
def test_evil_code_behind_the_seal_is_refused(evil: str) -> None:
    plan = chain_plan(2, 1, 1)
    text = print_plan(plan)
    line = f"    {plan.stages[0].code[0]}\n"
    assert line in text
    try:
        read = parse_plan(sealed(text.replace(line, f"    {evil}\n", 1)))
    except PlanFileError:
        return
    functions = {statement.function for stage in read.stages for statement in stage.code}
    assert functions <= {"layer", "loss", "batch", "getitem", "aten.clone.default"}


def test_commands_refuse_corrupted_files(tmp_path: Path) -> None:
    text, path = print_plan(chain_plan(2, 2, 2)), tmp_path / "corrupted.yaml"
    num_refused = 0
    for seed in range(40):
        dice = random.Random(seed)
        spoilt = corrupted_bytes(text.encode(), dice)
        if seed % 2:
            spoilt = corrupted_values(text, dice).encode()
        path.write_bytes(spoilt)
        result = CliRunner().invoke(check_command, [str(path)])
        assert result.exception is None or isinstance(result.exception, SystemExit), seed
        assert "Traceback" not in result.output
        if result.exit_code == 2:
            num_refused += 1
            assert "error: " in result.stderr
            assert "try: " in result.stderr
    assert num_refused > 20
