"""What this process and those it started have used, as the system counts it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


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
