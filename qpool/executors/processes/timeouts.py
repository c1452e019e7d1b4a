"""How long a worker may be silent. Pure.

A tile that a worker has computed before takes about as long again, so its silence is judged by
the slowest such tile seen. A tile of a shape that is new to a worker may have to be compiled
first, which takes as long as it takes: nobody is shot for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

#: Seconds without a finished tile, where neither a measurement nor the caller says otherwise, and
#: the least that is granted to a worker's first tile of a shape.
DEFAULT_LIMIT = 600.0

#: Seconds below which no silence is taken for more than a busy machine.
LEAST = 10.0

#: Times the slowest tile of its kind. A machine shared by twice as many processes as it has cores,
#: its clock halved, its cache lost, is slower by less.
FACTOR = 50.0

#: How much longer the next worker may take where one was ended.
STRETCH = 4.0


@dataclasses.dataclass
class Timeouts:
    """Deadlines from measured tiles; with ``fixed`` seconds, from those alone."""

    fixed: float | None = None
    _slowest: dict[Hashable, float] = dataclasses.field(default_factory=dict)

    def learn(self, kind: Hashable, seconds: float) -> None:
        """A tile of this kind took so long."""
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))

    def stretch(self, kind: Hashable, allowed: float) -> None:
        """A worker was ended after ``allowed`` seconds on a tile of this kind; others get more.

        If it did not hang but had slow work, the next one or the one after it finishes that.
        """
        self.learn(kind, STRETCH * allowed / FACTOR)

    def seconds(self, kind: Hashable, *, first: bool) -> float:
        """How long a tile of this kind may take; ``first``: the worker never computed one."""
        limit = DEFAULT_LIMIT if self.fixed is None else self.fixed
        if first:
            return max(limit, DEFAULT_LIMIT)
        if self.fixed is not None or kind not in self._slowest:
            return limit
        return min(limit, max(LEAST, FACTOR * self._slowest[kind]))
