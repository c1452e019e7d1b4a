"""Each gate's matrix and derivative against The Walrus, which Strawberry Fields takes them from."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from thewalrus import fock_gradients as walrus

from workers.engine import gates

R = st.floats(-1.5, 1.5)
CUTOFF = st.integers(2, 9)
PHI = 0.7


def value_and_derivative(make, r: float, cutoff: int):
    """The matrix at r, and its derivative contracted with fixed weights, by our vjp."""
    x = tf.constant(r, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        matrix = make(x, cutoff)
        weights = np.random.default_rng(0).normal(size=matrix.shape)
        total = tf.reduce_sum(matrix * weights)
    return matrix.numpy(), float(tape.gradient(total, x)), weights


def packed(tensor: np.ndarray, keeps: str) -> np.ndarray:
    """A gate's D x D x D x D tensor (out 0, out 1, in 0, in 1), as blocks."""
    cutoff = len(tensor)
    block, out, into = np.ogrid[:cutoff, :cutoff, :cutoff]
    if keeps == "sum":
        return tensor[out, (block - out) % cutoff, into, (block - into) % cutoff]
    return tensor[out, (out - block) % cutoff, into, (into - block) % cutoff]


@settings(max_examples=25, deadline=None)
@given(r=R, cutoff=CUTOFF)
def test_displacement(r: float, cutoff: int) -> None:
    theirs = walrus.displacement(r, 0.0, cutoff)
    slope = walrus.grad_displacement(theirs, r, 0.0)[0].real
    matrix, derivative, weights = value_and_derivative(gates.displacement, r, cutoff)
    np.testing.assert_allclose(matrix, theirs.real, atol=1e-12)
    np.testing.assert_allclose(derivative, (weights * slope).sum(), atol=1e-10)
    column = gates.displaced_vacuum(tf.constant(r, tf.float64), cutoff)
    np.testing.assert_allclose(column, matrix[:, 0], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(r=R, cutoff=CUTOFF)
def test_squeezing(r: float, cutoff: int) -> None:
    theirs = walrus.squeezing(r, 0.0, cutoff)
    slope = walrus.grad_squeezing(theirs, r, 0.0)[0].real
    matrix, derivative, weights = value_and_derivative(gates.squeezing, r, cutoff)
    np.testing.assert_allclose(matrix, theirs.real, atol=1e-12)
    np.testing.assert_allclose(derivative, (weights * slope).sum(), atol=1e-10)
    column = gates.squeezed_vacuum(tf.constant(r, tf.float64), cutoff)
    np.testing.assert_allclose(column, matrix[:, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "gradient", "keeps", "sign"),
    [
        (gates.beamsplitter, walrus.beamsplitter, walrus.grad_beamsplitter, "sum", -1),
        (
            gates.two_mode_squeezing,
            walrus.two_mode_squeezing,
            walrus.grad_two_mode_squeezing,
            "difference",
            1,
        ),
    ],
)
@settings(max_examples=15, deadline=None)
@given(r=R, cutoff=st.integers(2, 6))
def test_pairs(ours, theirs, gradient, keeps: str, sign: int, r: float, cutoff: int) -> None:
    tensor = theirs(r, PHI, cutoff)
    _, out, into = np.ogrid[:cutoff, :cutoff, :cutoff]
    phases = np.exp(1j * sign * PHI * (out - into))
    matrix, derivative, weights = value_and_derivative(ours, r, cutoff)
    np.testing.assert_allclose(matrix * phases, packed(tensor, keeps), atol=1e-11)
    assert np.isclose(np.abs(tensor).sum(), np.abs(matrix).sum())  # nothing is left out
    slope = packed(gradient(tensor, r, PHI)[0], keeps) / phases
    np.testing.assert_allclose(derivative, (weights * slope.real).sum(), atol=1e-9)


@pytest.mark.parametrize("cutoff", [2, 5, 8])
def test_mach_zehnder(cutoff: int) -> None:
    theirs = packed(walrus.mzgate(0.4, PHI, cutoff), "sum")
    real, imaginary = gates.mach_zehnder(tf.constant(0.4, tf.float64), cutoff)
    phases = np.exp(1j * PHI * np.arange(cutoff))
    matrix = real.numpy() + 1j * imaginary.numpy()
    np.testing.assert_allclose(matrix * phases, theirs, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_cubic_phase_is_unitary_and_has_the_slope_of_its_generator(gamma: float) -> None:
    cutoff = 6
    a = np.diag(np.sqrt(np.arange(1, cutoff)), 1)
    cube = np.linalg.matrix_power(a + a.T, 3) / 6
    x = tf.constant(gamma, tf.float64)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        real, imaginary = gates.cubic_phase(x, cutoff)
        element = imaginary[0, 3]
    matrix = real.numpy() + 1j * imaginary.numpy()
    np.testing.assert_allclose(matrix @ matrix.conj().T, np.eye(cutoff), atol=1e-12)
    slope = 1j * cube @ matrix
    np.testing.assert_allclose(tape.gradient(element, x), slope[0, 3].imag, atol=1e-12)


@pytest.mark.parametrize("transmissivity", [0.0, 0.35, 1.0])
def test_loss_keeps_the_trace_and_has_a_slope_where_nothing_is_lost(transmissivity: float) -> None:
    cutoff = 5
    t = tf.constant(transmissivity, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(t)
        diagonal = gates.loss(t, cutoff)[0]  # block 0: populations to populations
        photons = tf.reduce_sum(diagonal * np.arange(cutoff)[:, None], 0)
        total = photons[3]
    np.testing.assert_allclose(tf.reduce_sum(diagonal, 0), np.ones(cutoff), atol=1e-12)
    np.testing.assert_allclose(photons, transmissivity * np.arange(cutoff), atol=1e-12)
    if transmissivity:  # coherences go as the root of T: no slope at 0
        np.testing.assert_allclose(tape.gradient(total, t), 3.0, atol=1e-10)


def test_a_displaced_squeezed_vacuum_is_the_product_of_large_matrices() -> None:
    large, cutoff = 60, 8
    r_d, phi_d, r_s, phi_s = (tf.constant(x, tf.float64) for x in (0.6, 0.4, 0.5, -0.8))
    d = walrus.displacement(0.6, 0.4, large) @ walrus.squeezing(0.5, -0.8, large)[:, 0]
    ours = gates.displaced_squeezed_vacuum(r_d, phi_d, r_s, phi_s, cutoff)
    np.testing.assert_allclose(ours, d[:cutoff], atol=1e-12)


@pytest.mark.parametrize(
    "make", [gates.displacement, gates.squeezing, gates.beamsplitter, gates.two_mode_squeezing]
)
def test_second_derivatives_are_those_of_finite_differences(make) -> None:
    weights = np.random.default_rng(1).normal(size=make(tf.zeros([], tf.float64), 5).shape)

    def slope(value: float) -> tf.Tensor:
        x = tf.constant(value, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(make(x, 5) * weights)
        return tape.gradient(total, x)

    x = tf.constant(0.3, tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            total = tf.reduce_sum(make(x, 5) * weights)
        first = inner.gradient(total, x)
    second = outer.gradient(first, x)
    numeric = (slope(0.3 + 1e-5) - slope(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(second, numeric, rtol=1e-6, atol=1e-6)
