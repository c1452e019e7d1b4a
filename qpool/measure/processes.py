"""What processes have used, as the system counts it; and measurements in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from workers import affinity


def cpu_seconds() -> float:
    """User and system time of this process and all its descendants that live."""
    total = 0.0
    for process in _all():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def memory_bytes() -> int:
    """What this process and its descendants hold for themselves; what they share (the arena,
    pages of a fork that nobody wrote to) is left out where the system can tell."""
    total = 0
    for process in _all():
        with contextlib.suppress(psutil.Error):
            found = process.memory_info()
            total += found.rss - getattr(found, "shared", 0)
    return total


def _all() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield this
    yield from this.children(recursive=True)


def alone_on_a_core(module: str, *arguments: Any) -> Any:
    """What ``module``, run as a program of its own on one core, answers to ``arguments``."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    done = subprocess.run(
        [sys.executable, "-m", module, str(cores[-1]), json.dumps(arguments)],
        env=os.environ | affinity.environment(1),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(measure: Callable[..., Any]) -> None:
    """In such a program: measure on the core that it was given, and print what was found."""
    core, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
    affinity.pin((core,))
    affinity.keep_memory()
    affinity.bound_tensorflow(1)
    print(json.dumps(measure(*arguments)))
