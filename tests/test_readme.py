"""The README names every file of the project, and no file that does not exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is unknown")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def section() -> str:
    text = (ROOT / "README.md").read_text()
    return text.split("<!-- files: begin -->")[1].split("<!-- files: end -->")[0]


def test_every_file_has_its_line() -> None:
    named = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section(), flags=re.MULTILINE)
    assert {name for name, _ in named} == tracked()
    assert len(named) == len(tracked())
    assert all(len(role) > 5 for _, role in named)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
