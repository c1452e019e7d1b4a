"""Measures of states, against Strawberry Fields' own and against closed forms."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

from qpool import states
from qpool.errors import InputError
from workers.engine import TracedEngine

CUTOFF = 7


def state_of(r, *, loss: bool = False, cutoff: int = CUTOFF):
    program = sf.Program(2)
    name = program.params("r")
    with program.context as q:
        ops.S2gate(name) | (q[0], q[1])
        ops.Dgate(0.3, 0.7) | q[0]
        ops.Kgate(0.2) | q[1]
        if loss:
            ops.LossChannel(0.8) | q[0]
    options = {"cutoff_dim": cutoff, "dtype": tf.complex128}
    return TracedEngine("tf", backend_options=options).run(program, args={"r": r}).state


def single(r: float, **options):
    """The same state from Strawberry Fields' NumPy backend."""
    program = sf.Program(2)
    with program.context as q:
        ops.S2gate(r) | (q[0], q[1])
        ops.Dgate(0.3, 0.7) | q[0]
        ops.Kgate(0.2) | q[1]
        if options.get("loss"):
            ops.LossChannel(0.8) | q[0]
    return sf.Engine("fock", backend_options={"cutoff_dim": CUTOFF}).run(program).state


R = (0.1, 0.4)


@pytest.fixture(scope="module", params=[False, True], ids=["pure", "mixed"])
def pair(request):
    batched = state_of(tf.constant(R, tf.float64), loss=request.param)
    return batched, [single(r, loss=request.param) for r in R]


def test_norm(pair) -> None:
    batched, singles = pair
    np.testing.assert_allclose(states.ket_norm(batched), [s.trace() for s in singles], atol=1e-7)


def test_photon_distributions(pair) -> None:
    batched, singles = pair
    expected = np.stack([s.all_fock_probs() for s in singles])
    np.testing.assert_allclose(states.photon_distribution(batched), expected, atol=1e-7)
    for mode in range(2):
        found = states.photon_distribution(batched, mode)
        np.testing.assert_allclose(found, expected.sum(2 - mode), atol=1e-7)


def test_wigner_functions(pair) -> None:
    batched, singles = pair
    x, p = np.linspace(-3, 3, 9), np.linspace(-2, 4, 7)
    for mode in range(2):
        found = states.wigner(batched, mode, x, p)
        assert found.shape == (2, 9, 7)
        for ours, s in zip(found, singles, strict=True):  # there p comes first
            np.testing.assert_allclose(ours, s.wigner(mode, x, p).T, atol=1e-7)


def test_purity(pair) -> None:
    batched, singles = pair
    for mode in range(2):
        rho = np.stack([s.reduced_dm(mode) for s in singles])
        expected = np.einsum("bnm,bmn->b", rho, rho).real / np.einsum("bnn->b", rho).real ** 2
        np.testing.assert_allclose(states.purity(batched, mode), expected, atol=1e-7)
    if batched.is_pure:
        np.testing.assert_array_equal(states.purity(batched), [1.0, 1.0])
    else:
        rho = np.stack([s.dm() for s in singles]).transpose(0, 1, 3, 2, 4).reshape(2, 49, 49)
        expected = np.einsum("bnm,bmn->b", rho, rho).real / np.einsum("bnn->b", rho).real ** 2
        np.testing.assert_allclose(states.purity(batched), expected, atol=1e-7)


def test_fidelity(pair) -> None:
    batched, singles = pair
    target = single(0.2)
    ket = target.ket()
    expected = [
        np.einsum("ab,acbd,cd", ket.conj(), s.dm().reshape((CUTOFF,) * 4), ket).real
        for s in singles
    ]
    np.testing.assert_allclose(states.fidelity(batched, ket), expected, atol=1e-7)
    np.testing.assert_allclose(states.fidelity(batched, np.stack([ket, ket])), expected, atol=1e-7)
    with pytest.raises(InputError, match=r"\(7, 7\).*came \(7,\)"):
        states.fidelity(batched, ket[0])


def test_a_state_without_a_batch_axis_has_measures_without_one() -> None:
    state = state_of(0.3)
    grid = np.linspace(-1, 1, 3)
    shapes = [
        states.ket_norm(state).shape,
        states.purity(state, 0).shape,
        states.fidelity(state, state).shape,
        states.photon_distribution(state).shape,
        states.wigner(state, 1, grid, grid).shape,
    ]
    assert shapes == [(), (), (), (CUTOFF, CUTOFF), (3, 3)]
    np.testing.assert_allclose(
        states.fidelity(state, state), states.ket_norm(state) ** 2, atol=1e-7
    )


def test_squeezed_light_leaks_and_that_is_said(caplog) -> None:
    norm = states.ket_norm(state_of(tf.constant([0.1, 1.5], tf.float64)))
    with caplog.at_level(logging.WARNING, "qpool"):
        assert not states.warn_of_leakage(norm[0])
        assert states.warn_of_leakage(norm)
    assert "1 of 2 states" in caplog.text
    assert "raise cutoff_dim" in caplog.text


def test_measures_are_differentiable_and_traceable() -> None:
    """Two-mode squeezed vacuum: each mode is thermal, of purity 1 / cosh(2 r)."""

    @tf.function(jit_compile=True)
    def slope(r):
        with tf.GradientTape() as tape:
            tape.watch(r)
            value = states.purity(state_of(r, cutoff=16), 1)
        return value, tape.gradient(value, r)

    r = tf.constant([0.2, 0.35], tf.float64)
    value, gradient = slope(r)
    np.testing.assert_allclose(value, 1 / np.cosh(2 * r), atol=1e-5)
    np.testing.assert_allclose(gradient, -2 * np.tanh(2 * r) / np.cosh(2 * r), atol=1e-4)


def test_modes_by_any_whole_number_and_each_once() -> None:
    state = state_of(0.3)
    for modes in (np.int64(0), [0], [0, 0]):
        np.testing.assert_allclose(states.purity(state, modes), states.purity(state, 0))


def test_modes_that_are_not_there() -> None:
    with pytest.raises(InputError, match="modes 0 to 1"):
        states.purity(state_of(0.1), 2)


def test_the_wigner_function_of_the_vacuum() -> None:
    program = sf.Program(1)
    state = TracedEngine("tf", backend_options={"cutoff_dim": 3}).run(program).state
    found = states.wigner(state, 0, [0.0, 1.0], [0.0]).numpy()
    expected = np.exp(-np.array([[0.0], [1.0]]) / sf.hbar) / (math.pi * sf.hbar)
    np.testing.assert_allclose(found, expected, atol=1e-7)
