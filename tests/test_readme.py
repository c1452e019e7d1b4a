"""The READMEs' examples run as they stand, and lead where they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

#: In the order in which a reader meets them: an example may use what one before it made.
ALL = [
    README,
    *(ROOT / name / "README.md" for name in ("qpool/models", "workers", "qpool/executors")),
    *(ROOT / name / "README.md" for name in ("qpool/training", "qpool/training/campaign")),
    *(ROOT / name / "README.md" for name in ("qpool/studies", "scripts")),
    *(ROOT / name / "README.md" for name in ("qpool", "tests")),
]


def examples(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_examples_run() -> None:
    blocks = [block for path in ALL for block in examples(path)]
    assert len(blocks) >= 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(16, 2)\n10\nQuantumSFGenerator, pooled: processes, 2 workers" in done.stdout


def test_the_drop_in_is_fifteen_lines() -> None:
    assert len(examples(README)[0].strip().splitlines()) <= 15


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_can_be_read_at_a_sitting_and_its_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_all_are_there() -> None:
    found = {
        path
        for path in ROOT.rglob("README.md")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert found == set(ALL)


def test_the_commands_are_there_and_explain_themselves() -> None:
    for name in ("train", "test", "check"):
        assert any(f"scripts/{name}" in path.read_text() for path in ALL)
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111
