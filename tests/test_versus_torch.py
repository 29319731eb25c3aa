"""The benchmark against torch's own ways: all train alike, and ratios are judged with care."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic import chain_cluster

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from versus_torch import TOLERANCE, Verdict, compared, main, median_interval, problems  # noqa: E402
from versus_torch_model import Sizes  # noqa: E402
from versus_torch_ours import contests, prepared_for  # noqa: E402
from versus_torch_ranks import Measured  # noqa: E402


@pytest.mark.slow
def test_every_contender_finds_the_gradients_of_one_process() -> None:
    sizes = Sizes(num_blocks=4, width=32, context=8, global_batch_size=8)
    prepared = prepared_for(sizes, chain_cluster(2), 2)
    wanted = list(contests(sizes, 2))
    found = compared(sizes, wanted, prepared, 1)
    assert len(found) == len(wanted) == 7
    for verdict in found:
        assert verdict.theirs.difference <= TOLERANCE, verdict.theirs
        assert verdict.ours.difference <= TOLERANCE, verdict.ours
        assert min(*verdict.theirs.peak_bytes, *verdict.ours.peak_bytes) > 0
        assert len(verdict.time_ratios) == 1
        assert not verdict.takes_more, verdict


def measured(name: str, seconds: list[float], peak_bytes: int, difference: float = 0.0) -> Measured:
    return Measured(
        name=name,
        difference=difference,
        seconds=tuple(seconds),
        cpu_seconds=tuple(seconds),
        peak_bytes=(peak_bytes, 1),
    )


def verdict(ours: Measured) -> Verdict:
    theirs = measured("theirs", [1.0] * len(ours.seconds), 1000)
    return Verdict(theirs=theirs, ours=ours)


def test_ours_fails_where_it_is_slower_beyond_the_noise_or_larger_or_wrong() -> None:
    noisy = [0.5, 2.0, 1.1, 1.2, 0.9, 1.1, 1.1]
    assert problems(verdict(measured("ours", noisy, 1000))) == []
    slow = problems(verdict(measured("ours", [1.1] * 7, 1000)))
    assert slow == ["ours is slower than theirs"]
    large = problems(verdict(measured("ours", [0.9] * 7, 1010)))
    assert large == ["ours takes more memory than theirs"]
    for difference in (1e-5, math.inf, math.nan):
        (wrong,) = problems(verdict(measured("ours", [0.9] * 7, 10, difference)))
        assert "gradients differ" in wrong


def test_the_interval_holds_the_median_in_95_of_100_samples() -> None:
    assert median_interval([1.0]) == (1.0, 1.0)
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    ascending = [float(n) for n in range(1, 12)]
    assert median_interval(ascending) == (2.0, 10.0)  # of eleven: 98.8 %; (3, 9) is 93.5 %
    nine = [float(n) for n in range(1, 10)]
    assert median_interval(nine) == (2.0, 8.0)


def test_a_contender_that_does_not_exist_is_refused() -> None:
    done = CliRunner().invoke(main, ["--only", "Megatron"])
    assert done.exit_code == 2
    assert "Megatron" in done.output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_whole_table(num_ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    words = ["--ranks", str(num_ranks), "--rounds", "3", "--json", str(path)]
    command = [sys.executable, str(BENCHMARKS / "versus_torch.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: this machine's noise is not judged here
    figures = json.loads(path.read_text())
    assert len(figures) == {2: 14, 4: 22}[num_ranks]
    assert all(figure["difference"] <= TOLERANCE for figure in figures.values())
