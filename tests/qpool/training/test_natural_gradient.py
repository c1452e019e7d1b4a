"""The quantum Fisher information, against closed forms and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from qpool.errors import InputError
from qpool.training.natural_gradient import QuantumFisher, natural_gradient


def layer(gates, inputs=("x",), cutoff: int = 12, **initial) -> qpool.CircuitLayer:
    program = sf.Program(1)
    with program.context as q:
        gates(program.params, q)
    return qpool.CircuitLayer(
        program, inputs, readout="ket", cutoff_dim=cutoff, initial=initial, dtype="float64"
    )


def test_displacement_and_rotation_have_four_times_their_variances() -> None:
    """F of exp(-i theta G) is 4 var(G): of R, n's variance |alpha|^2; of Dgate's r, 1 / 4 * 4."""

    def gates(params, q):
        ops.Dgate(params("x")) | q[0]
        ops.Rgate(params("phi")) | q[0]
        ops.Dgate(params("r")) | q[0]

    made = layer(gates, phi=0.4, r=0.0)
    fisher = QuantumFisher(made, made.trainable_variables)(np.array([[0.5]]))
    assert made.trainable_parameters == ("phi", "r")
    assert float(fisher[0, 0]) == pytest.approx(4 * 0.25, abs=1e-6)
    assert float(fisher[1, 1]) == pytest.approx(4, abs=1e-6)


def test_it_is_the_curvature_of_the_fidelity() -> None:
    """1 - |<psi(w)|psi(w + d)>|^2 = d F d / 4 to second order; a mean over the batch."""
    model = qpool.CircuitLayer(
        qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=8).program,
        inputs=("z_0", "z_1", "z_2", "z_3"),
        readout="ket",
        cutoff_dim=8,
        seed=3,
        dtype="float64",
    )
    z = tf.constant(np.random.default_rng(1).normal(size=(3, 4)) * 0.1)
    fisher = QuantumFisher(model, model.trainable_variables)(z).numpy()
    np.testing.assert_allclose(fisher, fisher.T, atol=1e-10)
    weights = model.parameters.numpy()
    step = np.random.default_rng(2).normal(size=weights.shape) * 1e-3

    def kets(shift):
        model.parameters.assign(weights + shift)
        ket = model(z).numpy().reshape(3, -1)
        return ket / np.linalg.norm(ket, axis=1, keepdims=True)

    forward, backward = kets(step / 2), kets(-step / 2)
    lost = 1 - np.abs(np.sum(forward.conj() * backward, axis=1)) ** 2
    assert lost.mean() == pytest.approx(step @ fisher @ step / 4, rel=1e-3)


def test_a_natural_step_solves_for_the_gradient() -> None:
    fisher = tf.constant(np.diag([4.0, 8.0, 0.0]))
    gradients = [tf.constant([1.0, 2.0]), tf.constant([[3.0]])]
    turned = natural_gradient(fisher, gradients, damping=0.5)
    np.testing.assert_allclose(turned[0], [1 / 1.5, 2 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(turned[1], [[6.0]], rtol=1e-6)
    with pytest.raises(InputError, match="damping"):
        natural_gradient(fisher, gradients, damping=0.0)
    with pytest.raises(InputError, match=r"expected \(2, 2\)"):
        natural_gradient(fisher, gradients[:1])
    with pytest.raises(InputError, match="real variables"):
        QuantumFisher(lambda z: z, [])
