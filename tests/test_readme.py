"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(16, 2) 10" in done.stdout


def test_the_drop_in_is_fifteen_lines() -> None:
    first = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert first is not None
    assert len(first.group(1).strip().splitlines()) <= 15


def test_the_commands_are_there_and_explain_themselves() -> None:
    for name in ("train", "test", "check"):
        assert f"scripts/{name}" in README.read_text()
        assert (README.parent / "scripts" / name).stat().st_mode & 0o111
