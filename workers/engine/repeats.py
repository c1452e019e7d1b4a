"""Runs of steps that repeat, which are applied as a loop. Pure.

Owns where in a circuit's steps loops are. A circuit of L equal layers is found to be L times the
steps of one; so are the two interferometers within each. Knows nothing of numbers or TensorFlow.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

#: Steps that a loop must save at least: it has a cost of its own, to compile and to run.
_WORTH = 3


@dataclass(frozen=True)
class Run:
    """Steps from ``first`` on: ``period`` of them, ``count`` times over; or one step, once."""

    first: int
    period: int = 1
    count: int = 1

    @property
    def size(self) -> int:
        """How many steps it has in all."""
        return self.period * self.count


def runs(forms: Sequence[Hashable | None]) -> list[Run]:
    """All steps, in their order, as runs.

    ``forms`` says what a step of a loop must have in common with the one in its place in the next
    turn; None is a step that is in no loop.
    """
    return _within(list(forms), 0)


def _within(forms: list[Hashable | None], first: int) -> list[Run]:
    best = _best(forms)
    if best is None:
        return [Run(first + n) for n in range(len(forms))]
    after = best.first + best.size
    return [
        *_within(forms[: best.first], first),
        Run(first + best.first, best.period, best.count),
        *_within(forms[after:], first + after),
    ]


def _best(forms: list[Hashable | None]) -> Run | None:
    """The loop that saves most steps; of those that save as many, the shortest period."""
    best: Run | None = None
    most = _WORTH - 1
    for period in range(1, len(forms) // 2 + 1):
        alike = 0  # steps up to here that are as the one a period before
        for place in range(period, len(forms) + 1):
            same = (
                place < len(forms)
                and forms[place] is not None
                and forms[place] == forms[place - period]
            )
            if same:
                alike += 1
                continue
            count = alike // period + 1
            if count > 1 and period * (count - 1) > most:
                most = period * (count - 1)
                best = Run(place - alike - period, period, count)
            alike = 0
    return best
