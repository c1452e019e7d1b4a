"""A run that is killed again and again and gone on with, beside one that is not: the same bits.

Owns the kills (SIGKILL, and SIGTERM now and then, at random instants of the whole command: loading,
compiling, training, writing) and the comparison of the two directories.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpool.training import checkpoints

#: Worker counts that a run is begun and gone on with.
_WORKERS = (1, 2, 3)

_SETTINGS = {
    "steps": 600,
    "batch-size": 16,
    "layers": 1,
    "cutoff": 4,
    "critic-steps": 1,
    "ema-momentum": 0.9,
    "checkpoint-every": 20,
    "evaluate-every": 50,
    "readout": "homodyne",  # it draws: the draws have to be gone on with too
}


def kill_and_resume(kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What came of runs that were killed so often in all, compared with one that was not."""
    draws = random.Random(seed)
    settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
    where: Counter[str] = Counter()
    different: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory(prefix="qpool-resume-") as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        _finish(command("train", whole, 2, *settings))  # what is compiled is on disk after this
        began = time.monotonic()
        _finish(command("train", again, 3, *settings))
        seconds = time.monotonic() - began
        different += _differences(whole, again)
        say(f"the run without a kill took {seconds:.0f} s")
        while sum(where.values()) < kills:
            runs += 1
            broken = Path(folder) / f"broken-{runs}"
            while sum(where.values()) < kills:
                verb = "resume" if (broken / "run.json").exists() else "train"
                options = settings if verb == "train" else ()
                process = command(verb, broken, draws.choice(_WORKERS), *options)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=draws.uniform(0.0, seconds))
                if process.poll() is not None:
                    break
                process.send_signal(draws.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
                process.communicate()
                step = _step(broken)
                where["before a checkpoint" if step < 0 else "after one"] += 1
                say(f"kill {sum(where.values())} of {kills}, run {runs}: checkpoint at {step}")
            if (broken / "run.json").exists():
                _finish(command("resume", broken, draws.choice(_WORKERS)))
                different += _differences(whole, broken)
    return {
        "kills": sum(where.values()),
        "where": dict(where),
        "runs": runs,
        "different": different,
        "seconds_of_a_whole_run": seconds,
    }


def command(verb: str, out: Path, workers: int, *options: str) -> subprocess.Popen:
    """``qpool train`` or ``resume`` with so many workers, as a process."""
    arguments = [verb, *(["--out", str(out)] if verb == "train" else [str(out)])]
    return subprocess.Popen(
        [sys.executable, "-m", "qpool", *arguments, *options, f"--workers={workers}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        text=True,
    )


def _finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run failed with {process.returncode}:\n{said}")


def _step(out: Path) -> int:
    """The newest checkpoint's step; -1 where there is none."""
    return next(iter(checkpoints.Folder(out / "checkpoints").steps()), -1)


def _differences(whole: Path, broken: Path) -> list[str]:
    """What is not the same, to the bit: the tables, the last and the best checkpoint."""
    found = [
        name
        for name in ("metrics.csv", "evaluations.csv")
        if (whole / name).read_bytes() != (broken / name).read_bytes()
    ]
    folders = [checkpoints.Folder(out / "checkpoints") for out in (whole, broken)]
    for name in (next(iter(folders[0].steps().values())).name, "best.npz"):
        a, b = (checkpoints.read(folder.path / name) for folder in folders)
        if (a.step, a.calls, a.best, *a.arrays) != (b.step, b.calls, b.best, *b.arrays):
            found.append(name)
        found += [
            f"{name}: {k}" for k in a.arrays if a.arrays[k].tobytes() != b.arrays[k].tobytes()
        ]
    return found
