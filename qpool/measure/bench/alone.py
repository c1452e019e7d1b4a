"""Measurements in a process of their own, on one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from workers import affinity


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
