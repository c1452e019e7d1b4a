"""Wave functions, their integrals and Wigner functions, against what they are defined by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from qpool import phase_space

GRID = np.linspace(-12, 12, 4801)


@pytest.mark.parametrize("cutoff", [1, 2, 9, 30])
def test_wave_functions_are_orthonormal_and_those_of_scipy(cutoff: int) -> None:
    from scipy.special import eval_hermite

    psi = phase_space.wave_functions(tf.constant(GRID), cutoff).numpy()
    np.testing.assert_allclose(psi.T @ psi * (GRID[1] - GRID[0]), np.eye(cutoff), atol=1e-9)
    n = cutoff - 1
    scale = math.sqrt(2.0**n * math.factorial(n) * math.sqrt(math.pi))
    expected = eval_hermite(n, GRID) * np.exp(-(GRID**2) / 2) / scale
    np.testing.assert_allclose(psi[:, n], expected, atol=1e-9)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(x=st.floats(-6, 6), cutoff=st.integers(1, 12))
def test_overlaps_below_have_the_product_for_their_derivative(x: float, cutoff: int) -> None:
    at, step = tf.constant([x], tf.float64), 1e-4
    psi = phase_space.wave_functions(at, cutoff)[0].numpy()
    ends = [phase_space.overlaps_below(at + s * step, cutoff)[0].numpy() for s in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), np.outer(psi, psi), atol=1e-6)


def test_overlaps_below_go_from_none_to_all() -> None:
    ends = phase_space.overlaps_below(tf.constant([-14.0, 14.0], tf.float64), 12).numpy()
    np.testing.assert_allclose(ends[0], np.zeros((12, 12)), atol=1e-12)
    np.testing.assert_allclose(ends[1], np.eye(12), atol=1e-12)
