"""Timing in turns: what is compared is timed alternately, within one run.

Machines are noisy and speeds drift, so a figure alone says little; the ratio is the median over
turns, with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def turns_of(
    contenders: Mapping[str, tuple[Callable[[], Any], int]], turns: int
) -> dict[str, list[float]]:
    """Seconds per call (its median) of each contender, one figure a turn, taken alternately.

    A contender is a call, and how often it is made in a turn. Each is made once before.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call, _ in contenders.values():
        call()
    for _ in range(turns):
        for name, (call, calls) in contenders.items():
            seconds = []
            for _ in range(calls):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            found[name].append(statistics.median(seconds))
    return found


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """The median of the turns' ratios, and its quartiles."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}
