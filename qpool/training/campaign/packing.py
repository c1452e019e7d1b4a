"""How many runs go side by side, which is next, and how long the rest will take. Pure.

A run whose circuit is small gains little by a second core, and two runs on a core each gain all of
it: so there is a run a core as long as there are runs enough, and several cores to a run only where
there are fewer runs than cores. What memory there is bounds their number too.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

#: What a run is taken to hold before one has been measured, in bytes.
FIRST_GUESS = 900 << 20

#: Memory that is left to others.
RESERVE = 512 << 20


def cores_each(runs: int, cores: int) -> int:
    """How many cores each of so many runs gets, if all are to be busy."""
    return max(1, cores // max(1, runs))


def places(cores: Sequence[int], each: int, most: int | None = None) -> list[tuple[int, ...]]:
    """Cores cut into equal places, those that do not fill one given to the first ones."""
    count = max(1, len(cores) // each)
    if most is not None:
        count = min(count, most)
    size, over = divmod(len(cores), count) if each > 1 else (1, 0)
    found, start = [], 0
    for number in range(count):
        end = start + size + (number < over)
        found.append(tuple(cores[start:end]))
        start = end
    return found


def fits(available: int, running: int, largest: int) -> bool:
    """Whether memory holds one more run: ``largest`` bytes is the most that any has held, 0 before
    one was measured. The first run always fits: it is what measures."""
    return running == 0 or available >= (largest or FIRST_GUESS) * 1.1 + RESERVE


def longest_first(names: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """The order in which the last ones end together: runs not yet measured keep their places."""
    return sorted(names, key=lambda name: -seconds.get(name, 0.0))


def seconds_left(remaining: Iterable[float], places: int) -> float:
    """Until all are done, if each place takes the longest that is left when it is free."""
    ends = [0.0] * max(1, places)
    for seconds in sorted(remaining, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
