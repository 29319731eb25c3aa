"""What a process frees stays its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from planner.heap import keep_freed_memory

def num_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return len([bytearray(2**20) for _ in range(64)])  # 64 MiB, freed at once

if sys.argv[1] == "keeping":
    assert keep_freed_memory()
step()
before = num_faults()
step()
print((num_faults() - before) * resource.getpagesize())
"""
STEP_BYTES = 64 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs mallopt, which glibc has")
@pytest.mark.parametrize(("mode", "is_kept"), [("plain", False), ("keeping", True)])
def test_memory_of_the_last_step_is_used_again(mode: str, is_kept: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    touched_bytes = int(ran.stdout)
    assert touched_bytes < STEP_BYTES / 8 if is_kept else touched_bytes > STEP_BYTES / 2
