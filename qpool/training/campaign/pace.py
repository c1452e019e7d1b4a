"""How long runs take, from the steps of those that have been seen. Knows no processes, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Hashable


class Pace:
    """Seconds that a run of a kind takes: to its first step, for each one, and after its last."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, list[float]] = {}
        self._wholes: dict[Hashable, list[float]] = {}
        self._around: list[float] = []

    def finished(self, kind: Hashable, seconds: float, steps: int, per_step: float | None) -> None:
        """A run of that kind is done, of which so many steps were made in this time."""
        if per_step is None or not steps:
            self._wholes.setdefault(kind, []).append(seconds)
            return
        self._steps.setdefault(kind, []).append(per_step)
        self._around.append(max(0.0, seconds - steps * per_step))

    def expected(self, kind: Hashable, steps: int, per_step: float | None = None) -> float | None:
        """Seconds for so many steps of a run of that kind, and what is around them; None while
        nothing like it has been seen. ``per_step`` is of the run itself, where it is under way."""
        wholes = self._wholes.get(kind) or [w for of in self._wholes.values() for w in of]
        if not steps:
            return statistics.median(wholes) if wholes else None
        known = self._steps.get(kind) or [s for of in self._steps.values() for s in of]
        each = per_step if per_step is not None else statistics.median(known) if known else None
        if each is None:
            return None
        around = statistics.median(self._around) if self._around and per_step is None else 0.0
        return around + steps * each
