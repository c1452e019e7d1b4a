"""What computes the batches of one size for now, and whether another way may be tried.

Owns the account: seconds that the model has taken, seconds that went into comparing. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qpool.executors.auto.choices import Candidate, Choice, Memory

if TYPE_CHECKING:
    from qpool.executors.auto.autotuner import Autotuner

#: The share of the time spent in the model that comparing may take.
SHARE = 0.05

#: A training step takes about so many times as long as its forward call, which alone is timed.
_STEP = 3.0

#: Calls that may compile something, and say little of what the model takes.
_FIRST_CALLS = 2


@dataclasses.dataclass
class Course:
    """The ``choice`` so far; ``open`` while others are to be tried."""

    choice: Choice
    memory: Memory
    open: bool
    calls: int = 0
    seconds: float = 0.0
    autotuner: Autotuner | None = None
    candidates: Iterator[Candidate] | None = None

    @property
    def candidate(self) -> Candidate:
        return self.choice.candidate

    def note(self, seconds: float) -> None:
        """A forward call has taken so long."""
        self.calls += 1
        if self.calls > _FIRST_CALLS:
            self.seconds += _STEP * seconds

    def is_due(self, expected: float) -> bool:
        """Whether a trial of so many seconds is within the share."""
        measured = self.autotuner.spent if self.autotuner else 0.0
        return self.open and measured + expected <= SHARE * self.seconds

    def take(self, choice: Choice, *, complete: bool) -> None:
        """Go on as was measured; keep it for the next run."""
        known = {**self.choice.not_measured, **choice.not_measured}
        self.choice = dataclasses.replace(choice, not_measured=known, complete=complete)
        self.open = not complete
        self.memory.write(self.choice)

    def settle(self) -> None:
        """Try nothing more."""
        self.open = False
