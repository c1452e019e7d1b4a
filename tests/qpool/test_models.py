"""The generator: parameters, values against a program written by hand, errors."""

from __future__ import annotations

import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool


def test_two_modes_and_two_layers_have_28_parameters_and_all_get_a_gradient() -> None:
    model = qpool.models.QuantumSFGenerator(n_modes=2, layers=2, cutoff_dim=4, seed=0)
    z = tf.random.stateless_normal((3, 4), (0, 1)) * 0.5
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(z) ** 3)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert sum(int(tf.size(v)) for v in model.trainable_variables) == 28
    assert sum(int(tf.math.count_nonzero(tf.math.is_finite(g))) for g in gradients) == 28


@pytest.mark.parametrize(("encoding", "width"), [("coherent_state", 4), ("direct_displacement", 2)])
def test_values_are_those_of_the_program_written_by_hand(encoding: str, width: int) -> None:
    model = qpool.models.QuantumSFGenerator(
        latent_dim=width, layers=1, cutoff_dim=5, encoding_strategy=encoding, seed=3
    )
    w = {v.name: v.numpy()[0] for v in model.trainable_variables}
    z = np.random.default_rng(0).normal(size=(2, width)) * 0.4
    for row, ours in zip(z, model(tf.constant(z, tf.float32)), strict=True):
        program = sf.Program(2)
        with program.context as q:
            for mode in range(2):
                if encoding == "coherent_state":
                    ops.Xgate(row[2 * mode]) | q[mode]
                    ops.Zgate(row[2 * mode + 1]) | q[mode]
                else:
                    ops.Dgate(row[mode]) | q[mode]
            ops.BSgate(w["theta_1"][0], w["phi_1"][0]) | (q[0], q[1])
            ops.Rgate(w["rotation_1"][0]) | q[0]
            for mode in range(2):
                ops.Sgate(w["squeezing_r"][mode]) | q[mode]
            ops.BSgate(w["theta_2"][0], w["phi_2"][0]) | (q[0], q[1])
            ops.Rgate(w["rotation_2"][0]) | q[0]
            for mode in range(2):
                ops.Dgate(w["displacement_r"][mode], w["displacement_phi"][mode]) | q[mode]
            for mode in range(2):
                ops.Kgate(w["kerr"][mode]) | q[mode]
        state = sf.Engine("fock", backend_options={"cutoff_dim": 5}).run(program).state
        for mode in range(2):
            assert float(ours[mode]) == pytest.approx(state.quad_expectation(mode)[0], abs=2e-5)


def test_batch_one_is_like_any_other() -> None:
    model = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=4, seed=1)
    z = tf.random.stateless_normal((3, 4), (0, 1)) * 0.5
    np.testing.assert_allclose(model(z)[:1], model(z[:1]), atol=1e-6)


@pytest.mark.parametrize("modes", [1, 3])
def test_other_numbers_of_modes(modes: int) -> None:
    model = qpool.models.QuantumSFGenerator(
        n_modes=modes, latent_dim=2 * modes, layers=1, cutoff_dim=3, seed=1
    )
    assert model(tf.zeros((2, 2 * modes))).shape == (2, modes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_dim": 3}, "needs latent_dim=4, not 3"),
        ({"encoding_strategy": "coherent"}, "did you mean 'coherent_state'"),
        ({"cutoff_dim": 1}, "cutoff_dim"),
        ({"layers": 0}, "layers"),
        ({"n_modes": 0}, "n_modes"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(qpool.errors.ConfigurationError, match=words):
        qpool.models.QuantumSFGenerator(**options)


def test_a_z_of_the_wrong_width() -> None:
    model = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=3)
    with pytest.raises(qpool.errors.InputError, match=r"\(batch, 4\)"):
        model(tf.zeros((2, 3)))
