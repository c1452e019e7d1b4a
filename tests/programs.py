"""Programs that tests start: what one of them keeps on disk, and the next one finds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from workers import cache


def run(code: str, folder: Path | str) -> subprocess.CompletedProcess[str]:
    """Run it with ``folder`` for its cache, told nothing of this process's. It must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment | {cache._VARIABLE: str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
