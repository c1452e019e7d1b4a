"""How a pool scales: a model of a step's time, its constants from measurements, and a known law.

    step(W) = serial + W dispatch + ceil(tiles / W) tile (1 + contention (W - 1))

``serial`` is what the coordinator does however many workers there are (TensorFlow, copies, sums),
``dispatch`` what it does for each of them, ``contention`` how much slower a tile is for each
further worker at work (shared caches and memory). Pure, but for the fits. The Universal Scalability
Law is Gunther's (Guerrilla Capacity Planning, Springer 2007):

    rate(W) = rate(1) W / (1 + sigma (W - 1) + kappa W (W - 1))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from workers.errors import DataError


@dataclasses.dataclass(frozen=True)
class Step:
    """A measured step: ``seconds`` in all, with ``workers`` that shared ``tiles`` of so many
    ``tile_seconds`` each."""

    workers: int
    tiles: int
    seconds: float
    tile_seconds: float


@dataclasses.dataclass(frozen=True)
class Constants:
    """Seconds, but for ``contention``, which is a share of a tile's time."""

    serial: float
    dispatch: float
    tile: float
    contention: float

    def step(self, workers: int, tiles: int) -> float:
        """Seconds of a step."""
        busy = min(workers, tiles)
        rounds = -(-tiles // workers)
        computing = rounds * self.tile * (1 + self.contention * (busy - 1))
        return self.serial + busy * self.dispatch + computing

    def speed_up(self, workers: int, tiles: int) -> float:
        """How many times faster than one worker."""
        return self.step(1, tiles) / self.step(workers, tiles)

    def efficiency(self, workers: int, tiles: int) -> float:
        """Speed-up over workers."""
        return self.speed_up(workers, tiles) / workers


def fit(steps: Sequence[Step]) -> Constants:
    """The constants that explain the steps best, none of them negative.

    Two counts of workers at least: else what is serial cannot be told from what is dispatch.
    """
    if len({step.workers for step in steps}) < 2:
        raise DataError(
            "a scaling model needs measurements with two counts of workers at least; came "
            f"{sorted({step.workers for step in steps})}"
        )
    others = np.array([[1.0, min(step.workers, step.tiles) - 1.0] for step in steps])
    tile, slower = nnls(others, np.array([step.tile_seconds for step in steps]))[0]
    outside = [step.seconds - -(-step.tiles // step.workers) * step.tile_seconds for step in steps]
    ones = np.array([[1.0, float(min(step.workers, step.tiles))] for step in steps])
    weights = np.array([1 / step.seconds for step in steps])  # errors are relative ones
    serial, dispatch = nnls(ones * weights[:, None], np.array(outside) * weights)[0]
    return Constants(float(serial), float(dispatch), float(tile), float(slower / tile))


@dataclasses.dataclass(frozen=True)
class Law:
    """The Universal Scalability Law: ``rate`` of one worker, ``sigma`` (contention) and ``kappa``
    (coherency: every worker with every other)."""

    rate: float
    sigma: float
    kappa: float

    def rate_of(self, workers: float) -> float:
        """Samples a second."""
        return (
            self.rate
            * workers
            / (1 + self.sigma * (workers - 1) + self.kappa * workers * (workers - 1))
        )

    @property
    def best(self) -> float:
        """How many workers are the most that still help; infinite without coherency costs."""
        if self.kappa == 0:
            return float("inf")
        return float(np.sqrt((1 - self.sigma) / self.kappa)) if self.sigma < 1 else 1.0


def fit_law(workers: Sequence[int], rates: Sequence[float]) -> Law:
    """The law through measured rates: linear least squares in W / rate, with no negative term.

    Three counts of workers at least: it has three constants.
    """
    if len(set(workers)) < 3:
        raise DataError(
            "the Universal Scalability Law has three constants, so it needs three counts of "
            f"workers; came {sorted(set(workers))}"
        )
    w = np.asarray(workers, float)
    terms = np.stack([np.ones_like(w), w - 1, w * (w - 1)], 1)
    weights = np.asarray(rates) / w  # relative errors: a slow point counts as much as a fast one
    a, b, c = nnls(terms * weights[:, None], np.ones_like(w))[0]
    return Law(float(1 / a), float(b / a), float(c / a))
