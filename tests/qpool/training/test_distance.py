"""The energy distance against its definition and a case with a closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qpool.training import distance

points = arrays(np.float64, st.tuples(st.integers(2, 6), st.just(2)), elements=st.floats(-5, 5))


@given(points, points)
def test_it_is_a_distance_of_samples(x: np.ndarray, y: np.ndarray) -> None:
    d = distance.energy_distance(x, y)
    assert d >= 0
    assert d == pytest.approx(distance.energy_distance(y, x), abs=1e-6)
    assert distance.energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert distance.energy_distance(3 * x, 3 * y) ** 2 == pytest.approx(3 * d**2, abs=1e-6)


def test_two_points_apart() -> None:
    # All mass at 0 against all mass at a: sqrt(2 a).
    x, y = np.zeros((4, 1)), np.full((3, 1), 2.0)
    assert distance.energy_distance(x, y) == pytest.approx(2.0)


def test_one_dimension_is_twice_the_cramer_distance() -> None:
    from scipy.stats import energy_distance

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(1.0, 2.0, size=70)
    ours = distance.energy_distance(x[:, None], y[:, None])
    assert ours == pytest.approx(energy_distance(x, y), rel=1e-9)


def test_the_floor_is_what_equal_samples_reach() -> None:
    rng = np.random.default_rng(1)
    real, same, other = rng.normal(size=(3, 200, 2))
    floor = distance.real_against_real(real)
    assert distance.mean_distance(same, real) == pytest.approx(floor, rel=0.3)
    assert distance.mean_distance(other + 1.0, real) > 3 * floor


def test_coverage_falls_when_a_mode_is_left_out() -> None:
    rng = np.random.default_rng(2)
    modes = np.array([[-3.0, 0.0], [3.0, 0.0]])[rng.integers(0, 2, 400)]
    real, same = modes + 0.2 * rng.normal(size=(2, 400, 2))
    assert distance.coverage(real, real) == 1.0
    assert distance.coverage(same, real) > 0.9
    assert distance.coverage(same[same[:, 0] < 0], real) == pytest.approx(0.5, abs=0.1)
    assert distance.coverage(same + 100.0, real) == 0.0
