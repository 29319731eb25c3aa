"""The README's Python snippet does what the README says."""

import re
from pathlib import Path

import pytest

from planner.check import check
from planner.plan.file import read_plan

ROOT = Path(__file__).parent.parent


def test_the_snippet_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(from planner.*?)```", readme, re.DOTALL)
    (tmp_path / "model.py").write_text((ROOT / "examples" / "mlp.py").read_text())
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    plan = read_plan("model.plan.yaml")
    assert plan.world_size <= 8  # so small a model may be faster on fewer
    assert plan.global_batch_size == 64
    assert check(plan).passed
