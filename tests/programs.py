"""Programs that tests start, in processes of their own; with a cache of their own, if wanted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from workers import cache


def run(
    code: str, folder: Path | str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it from the root of the project, told nothing of this process's compiling where it has
    ``folder`` for its cache. It must end well."""
    given = dict(os.environ if environment is None else environment)
    if folder is not None:
        given.pop("TF_XLA_FLAGS", None)
        given[cache._VARIABLE] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=given,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
