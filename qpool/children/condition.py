"""What the system says of a process: how it ended, and whether it is stopped. Owns the words."""

from __future__ import annotations

import signal

#: Seconds of silence after which a process that is seen to be stopped is given up. A system that
#: suspends a whole job continues its processes one after another.
STOPPED_TIMEOUT = 5.0


def describe_exit(code: int | None) -> str:
    """``"killed by SIGKILL (out of memory?)"``, ``"exit code 3"``, ..."""
    if code is None:
        return "ended in an unknown way"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = {
        "SIGKILL": " (the kernel does this when memory runs out)",
        "SIGBUS": " (memory that could not be had)",
        "SIGILL": " (an instruction this CPU lacks)",
    }.get(name, "")
    return f"was killed by {name}{hint}"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; False too if that cannot be known."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
