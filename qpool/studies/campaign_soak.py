"""A campaign that is killed again and again and gone on with, beside one that is not: the same
bits, and nothing left behind.

Owns the kills (SIGKILL, and SIGTERM now and then, of the whole command at random instants) and the
comparison of all runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

#: Twelve runs of two programs.
_CAMPAIGN = """
steps = 400
batch_size = 16
cutoff = 5
checkpoint_every = 20
evaluate_every = 100
[grid]
data = ["iris", "wine"]
layers = [1, 2]
seed = [1, 2, 3]
"""


def kill_and_go_on(kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What came of a campaign that was killed so often, compared with one that was not."""
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="qpool-campaign-") as folder:
        config, whole, broken = (Path(folder) / name for name in ("c.toml", "whole", "broken"))
        config.write_text(_CAMPAIGN)
        began = time.monotonic()
        _finish(_command(config, whole, 2))
        seconds = time.monotonic() - began
        say(f"the campaign without a kill took {seconds:.0f} s")
        left = 0
        for number in range(1, kills + 1):
            process = _command(config, broken, draws.choice((1, 2)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=draws.uniform(1.0, seconds / 3))
            if process.poll() is not None:
                say("it was done before the kill")
                break
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(draws.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
            process.communicate()
            left += len(psutil.wait_procs(children, timeout=20)[1])
            done = len(list(broken.glob("runs/*/summary.json")))
            say(f"kill {number} of {kills}: {done} runs were done")
        summary = json.loads(_finish(_command(config, broken, 2)))
        runs = sorted(path.name for path in (whole / "runs").iterdir())
        different = [
            f"{run}/{name}"
            for run in runs
            for name in ("metrics.csv", "evaluations.csv")
            if (whole / "runs" / run / name).read_bytes()
            != (broken / "runs" / run / name).read_bytes()
        ]
    return {
        "kills": number,
        "runs": len(runs),
        "finished": summary["finished"],
        "different": different,
        "processes_left": left,
        "seconds_of_a_whole_campaign": seconds,
    }


def _command(config: Path, out: Path, cores: int) -> subprocess.Popen:
    words = ["campaign", "--config", str(config), "--out", str(out), f"--cores={cores}", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "qpool", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        text=True,
    )


def _finish(process: subprocess.Popen) -> str:
    found, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the campaign failed with {process.returncode}:\n{said}")
    return str(found)
