"""Homodyne samples and densities: distributions, gradients, and the edges."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from scipy.stats import qmc
from strawberryfields import ops

import qpool
from qpool.models.readouts import Density, Homodyne, Ket, find
from workers.engine import TracedEngine

#: Points that fill the square evenly: averages over them are close to expectation values.
U = qmc.Sobol(2, rng=np.random.default_rng(8)).random(4096)


def entangled(r, *, loss: float | None = None, cutoff: int = 14, dtype=tf.complex128):
    """Two-mode squeezed vacuum, displaced: x_0 and x_1 are correlated, p_0 and p_1 against."""
    program = sf.Program(2)
    name = program.params("r")
    with program.context as q:
        ops.S2gate(name) | (q[0], q[1])
        ops.Xgate(0.5) | q[0]
        if loss is not None:
            ops.LossChannel(loss) | q[0]
    engine = TracedEngine("tf", backend_options={"cutoff_dim": cutoff, "dtype": dtype})
    return engine.run(program, args={"r": r}).state


def test_homodyne_samples_follow_the_joint_distribution() -> None:
    r = 0.4
    x = Homodyne()(entangled(tf.fill([len(U)], tf.constant(r, tf.float64))), U).numpy()
    cosh, sinh = math.cosh(2 * r), math.sinh(2 * r)  # hbar = 2: the vacuum's variance is 1
    np.testing.assert_allclose(x.mean(0), [0.5, 0.0], atol=2e-3)
    np.testing.assert_allclose(np.cov(x.T), [[cosh, sinh], [sinh, cosh]], atol=1e-2)
    p = Homodyne(phi=math.pi / 2)(entangled(tf.fill([len(U)], tf.constant(r, tf.float64))), U)
    np.testing.assert_allclose(np.cov(p.numpy().T), [[cosh, -sinh], [-sinh, cosh]], atol=1e-2)
    np.testing.assert_allclose(p.numpy().mean(0), [0.0, 0.0], atol=2e-3)


def one_photon(x: float) -> float:
    return x**2 * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def test_a_homodyne_sample_is_the_quantile_of_its_draw() -> None:
    """One photon: p(x) = x^2 exp(-x^2 / 2) / sqrt(2 pi), with a node, which no sample hits."""
    from scipy import integrate

    program = sf.Program(1)
    with program.context as q:
        ops.Fock(1) | q[0]
    u = np.array([[1e-6], [0.2], [0.49], [0.5000001], [0.9], [0.999999]])
    engine = TracedEngine("tf", backend_options={"cutoff_dim": 5, "dtype": tf.complex128})
    state = engine.run(program).state
    for row in u:
        x = float(Homodyne()(state, row[None])[0, 0])
        assert integrate.quad(one_photon, -12, x)[0] == pytest.approx(row[0], abs=1e-8)


@pytest.mark.parametrize("loss", [None, 1.0], ids=["pure", "mixed"])
def test_homodyne_samples_have_the_pathwise_gradient(loss) -> None:
    u, step = tf.constant(U[:5]), 1e-5
    r = tf.constant([0.2, 0.3, 0.4, 0.1, 0.5], tf.float64)

    def sample(r):
        return Homodyne(0.3)(entangled(r, loss=loss, cutoff=8), u)

    with tf.GradientTape(persistent=True) as outer:
        outer.watch(r)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(r)
            x = sample(r)
            columns = [tf.reduce_sum(x[:, n]) for n in (0, 1)]
        slopes = [tape.gradient(column, r) for column in columns]
    bends = [outer.gradient(slope, r) for slope in slopes]
    ends = [sample(r + sign * step).numpy() for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(np.stack(slopes, 1), numeric, rtol=1e-5, atol=1e-6)
    bent = (ends[0] + ends[1] - 2 * x.numpy()) / step**2
    np.testing.assert_allclose(np.stack(bends, 1), bent, rtol=1e-2, atol=1e-3)


def test_a_lossless_channel_does_not_change_a_sample() -> None:
    r = tf.constant([0.2, 0.4], tf.float64)
    pure, mixed = (Homodyne(0.3)(entangled(r, loss=loss, cutoff=7), U[:2]) for loss in (None, 1.0))
    np.testing.assert_allclose(pure, mixed, atol=1e-9)


def test_single_precision_samples_are_close_to_double_ones() -> None:
    r = np.array([0.2, 0.4, 0.3])
    single = Homodyne()(entangled(tf.constant(r, tf.float32), dtype=tf.complex64), U[:3])
    double = Homodyne()(entangled(tf.constant(r)), U[:3])
    assert single.dtype == tf.float32
    np.testing.assert_allclose(single, double, atol=1e-3)


@pytest.mark.parametrize("loss", [None, 0.7], ids=["pure", "mixed"])
def test_a_density_is_strawberry_fields_with_the_ancilla_traced_out(loss) -> None:
    state = entangled(tf.constant([0.3], tf.float64), loss=loss, cutoff=9)
    readout = Density(low=-6, high=6, points=61, ancillas=1)
    found = readout(state)[0].numpy()
    program = sf.Program(2)
    with program.context as q:
        ops.S2gate(0.3) | (q[0], q[1])
        ops.Xgate(0.5) | q[0]
        if loss is not None:
            ops.LossChannel(loss) | q[0]
    plain = sf.Engine("fock", backend_options={"cutoff_dim": 9}).run(program).state
    np.testing.assert_allclose(found, plain.x_quad_values(0, readout.grid, readout.grid), atol=2e-3)
    step = readout.grid[1] - readout.grid[0]
    assert found.sum() * step == pytest.approx(plain.trace(), abs=1e-6)
    joint = Density(low=-6, high=6, points=61)(state)[0].numpy()
    np.testing.assert_allclose(joint.sum(1) * step, found, atol=1e-6)


def test_a_generator_that_samples(pool) -> None:
    """The draws follow the seed: compiled in workers, the same for any tile, pulled back once."""
    options = {"layers": 1, "cutoff_dim": 4, "readout": "homodyne", "seed": 3}
    model = qpool.models.QuantumSFGenerator(**options)
    z = tf.constant(np.random.default_rng(0).normal(size=(6, 4)) * 0.3, tf.float32)
    with qpool.parallelize(model, pool=pool, tile=2) as generator:
        with tf.GradientTape() as tape:
            first = generator(z)
            loss = tf.reduce_sum(first**2)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        again = generator(z)
        stats = generator.stats()
    assert first.shape == (6, 2)
    assert stats["random_draws"] == "seeded"
    assert stats["compiled"][0]["level"] == "xla", stats["compiled"]
    assert np.abs(first - again).max() > 1e-3
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert sum(float(tf.reduce_sum(tf.abs(g))) for g in gradients) > 0


def test_read_outs_are_saved_with_their_models(tmp_path) -> None:
    options = {"n_modes": 2, "latent_dim": 4, "layers": 1, "cutoff_dim": 3}
    model = qpool.models.QuantumSFGenerator(**options, readout=Density(-1.0, 1.0, 5, ancillas=1))
    assert model(tf.zeros((2, 4))).shape == (2, 5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(tf.zeros((2, 4))), model(tf.zeros((2, 4))))
    assert again.readout.get_config() == model.readout.get_config()


def test_a_saved_model_draws_on_from_where_it_stood(tmp_path) -> None:
    model = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=3, readout="homodyne", seed=3)
    z = tf.zeros((2, 4))
    model(z)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(z), model(z))


def test_bad_read_outs() -> None:
    with pytest.raises(qpool.errors.ConfigurationError, match="did you mean 'homodyne'"):
        find("homodine")
    with pytest.raises(qpool.errors.ConfigurationError, match="fewer ancillas"):
        qpool.models.QuantumSFGenerator(readout=Density(ancillas=2))
    with pytest.raises(qpool.errors.ConfigurationError, match="low < high"):
        Density(low=1.0, high=0.0)
    with pytest.raises(qpool.errors.ConfigurationError, match="pure"):
        Ket()(entangled(0.1, loss=0.9, cutoff=3))
