"""Which tiles go to which node. Pure.

Tiles are given in runs, since a run's rows travel as one piece. A node's speed is the tiles that it
computed in a second, against the other nodes in the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)

#: How much of what is believed of a node's speed one step changes; and of one that had no tile,
#: towards the mean: else it would never have one again.
_NEWS, _DOUBT = 0.2, 0.02


@dataclasses.dataclass(frozen=True)
class Run:
    """The tiles from ``first`` up to, and without, ``stop``."""

    first: int
    stop: int

    @property
    def tiles(self) -> int:
        return self.stop - self.first


def apportion(run: Run, speeds: Mapping[Node, float]) -> dict[Node, Run]:
    """Cut a run into one for each node, in the order given, as long as its speed is high.

    Lengths are the nearest whole numbers that add up (largest remainders); nodes that would get
    nothing are left out. Speeds are positive, in any unit.
    """
    whole = sum(speeds.values())
    ideal = {node: run.tiles * speed / whole for node, speed in speeds.items()}
    lengths = {node: int(length) for node, length in ideal.items()}
    rest = run.tiles - sum(lengths.values())
    for node in sorted(ideal, key=lambda n: lengths[n] - ideal[n])[:rest]:
        lengths[node] += 1
    runs, first = {}, run.first
    for node, length in lengths.items():
        if length:
            runs[node] = Run(first, first + length)
            first += length
    return runs


def learn(
    speeds: Mapping[Node, float], tiles: Mapping[Node, int], seconds: Mapping[Node, float]
) -> dict[Node, float]:
    """The speeds after a step in which nodes computed so many tiles in so many seconds.

    Only ratios are learned: the mean over the nodes that took part stays what it was, so that a
    step of cheap tiles does not make a node look fast. One that had none comes nearer to the mean.
    """
    seen = {n: tiles[n] / max(seconds[n], 1e-9) for n in tiles if tiles[n] and n in speeds}
    if not seen:
        return dict(speeds)
    scale = sum(speeds[n] for n in seen) / sum(seen.values())
    mean = sum(speeds.values()) / len(speeds)
    return {
        n: (1.0 - _NEWS) * speed + _NEWS * seen[n] * scale
        if n in seen
        else (1.0 - _DOUBT) * speed + _DOUBT * mean
        for n, speed in speeds.items()
    }
