"""Faults on purpose, at named points of a worker's life. For the tests and ``scripts/soak``.

A worker does nothing of this by itself: faults come with its Start message or in an Inject
message, which only a test sends.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace

#: Where a fault can strike: before the imports, before Hello, while a model is built, before new
#: weights are loaded, before a tile is computed, after a tile is written and before it is counted,
#: before an answer is sent, and in the loop that receives messages.
POINTS = ("start", "hello", "build", "load", "forward", "backward", "written", "answer", "loop")

#: What a fault does.
ACTIONS = ("kill", "segv", "abort", "exit", "stop", "raise", "memory")


class InjectedFault(BaseException):
    """Stands for a defect of the worker's own loop, so no handler of the model's errors sees it."""


@dataclass(frozen=True)
class Fault:
    """Do ``action`` on reaching ``point``, after having passed it ``after`` times."""

    point: str
    action: str
    after: int = 0

    def __post_init__(self) -> None:
        if self.point not in POINTS or self.action not in ACTIONS:
            raise ValueError(f"expected a point of {POINTS}, an action of {ACTIONS}; came {self}")


class Faults:
    """The faults that this worker has still to commit."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._left = list(faults)

    def add(self, faults: tuple[Fault, ...]) -> None:
        self._left += faults

    def reach(self, point: str) -> None:
        """Say that the worker is at this point; it may not come back from here."""
        if not self._left:
            return
        due = [f.action for f in self._left if f.point == point and not f.after]
        self._left = [
            replace(f, after=f.after - 1) if f.point == point else f
            for f in self._left
            if f.point != point or f.after
        ]
        for action in due:
            commit(action)


def commit(action: str) -> None:
    """Do it to this process."""
    if action == "exit":
        os._exit(3)
    if action == "raise":
        raise InjectedFault("raised on purpose")
    if action == "memory":
        bytearray(sys.maxsize)
    number = {
        "kill": signal.SIGKILL,
        "segv": signal.SIGSEGV,
        "abort": signal.SIGABRT,
        "stop": signal.SIGSTOP,
    }[action]
    os.kill(os.getpid(), number)
