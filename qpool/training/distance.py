"""How far apart two samples are."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

#: Random halves that are compared; real neighbours that a generated sample is to be nearer than.
_DRAWS, _NEIGHBOURS = 50, 5


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The energy distance of two samples (Székely & Rizzo, J. Stat. Plan. Infer. 143, 2013).

    ``x`` is (n, d), ``y`` is (m, d). Returns sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|), each mean over
    all pairs of the empirical distributions; at least 0, in the data's units. For samples of one
    distribution it falls with their size as n^(-1/2), so compare only distances of equal sizes.
    """
    squared = 2.0 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    return float(np.sqrt(max(squared, 0.0)))


def mean_distance(rows: np.ndarray, real: np.ndarray) -> float:
    """Energy distance of ``rows`` to ``real``, the mean over random subsets of half of ``real``.

    Each draw compares half of the real rows, chosen at random, with as many of ``rows``. The same
    sizes as in ``real_against_real``, so the two can be compared.
    """
    generator = np.random.default_rng(0)
    half = len(real) // 2
    found = [
        energy_distance(
            rows[generator.permutation(len(rows))[:half]],
            real[generator.permutation(len(real))[:half]],
        )
        for _ in range(_DRAWS)
    ]
    return float(np.mean(found))


def real_against_real(real: np.ndarray) -> float:
    """The floor: energy distance of one random half of real data to the other, the mean of many."""
    generator = np.random.default_rng(0)
    half = len(real) // 2
    found = []
    for _ in range(_DRAWS):
        order = generator.permutation(len(real))
        found.append(energy_distance(real[order[:half]], real[order[half : 2 * half]]))
    return float(np.mean(found))


def coverage(rows: np.ndarray, real: np.ndarray) -> float:
    """The share of real samples that have a generated one nearer than their 5th real neighbour.

    It falls where modes of the data are left out (Naeem et al., ICML 2020); at most 1. As many of
    ``rows`` are looked at as there are real ones, the first of them.
    """
    reach = cKDTree(real).query(real, _NEIGHBOURS + 1)[0][:, -1]
    nearest = cKDTree(rows[: len(real)]).query(real)[0]
    return float(np.mean(nearest <= reach))
