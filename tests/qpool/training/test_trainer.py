"""The trainer: the seed's snippet in qpool's names, and the step's gradients."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import qpool
from qpool.training.gan import QuantumGAN


def small() -> qpool.models.QuantumSFGenerator:
    return qpool.models.QuantumSFGenerator(
        n_modes=2,
        latent_dim=2,
        layers=1,
        cutoff_dim=3,
        encoding_strategy="direct_displacement",
        seed=2,
    )


ROWS = np.random.default_rng(0).normal(size=(20, 2))


def test_train_is_the_same_pooled_or_not(pool) -> None:
    weights = []
    for strategy, options in (("processes", {"pool": pool}), ("sequential", {})):
        with qpool.QuantumGANTrainer(small(), seed=4, **options) as trainer:
            history = trainer.train(ROWS, epochs=2, batch_size=8, strategy=strategy)
            weights.append(trainer.generator.get_weights())
            assert len(history.history["generator_loss"]) == 2
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_data_is_checked_before_any_worker_starts() -> None:
    trainer = qpool.QuantumGANTrainer(small())
    with pytest.raises(qpool.errors.DataError, match="NaN"):
        trainer.train([[np.nan, 1.0]], epochs=1, batch_size=1)
    with pytest.raises(qpool.errors.DataError, match="smaller batch_size"):
        trainer.train(ROWS, epochs=1, batch_size=21)
    with pytest.raises(qpool.errors.ConfigurationError, match="epochs"):
        trainer.train(ROWS, epochs=0, batch_size=4)
    assert not isinstance(trainer.generator, qpool.ParallelGenerator)


def test_the_critic_steps_leave_the_generators_gradient_right() -> None:
    initial = keras.initializers.GlorotUniform(seed=7)
    generator = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, kernel_initializer=initial)]
    )
    generator.latent_dim = 2
    critic = keras.Sequential(  # smooth: a finite difference across a kink says nothing
        [
            keras.Input((2,)),
            keras.layers.Dense(8, "tanh", kernel_initializer=initial),
            keras.layers.Dense(1, kernel_initializer=initial),
        ]
    )
    gan = QuantumGAN(generator, critic, critic_steps=2, seed=1)
    gan.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
    before = [w.copy() for w in generator.get_weights()]
    gan.train_step(tf.constant(ROWS[:8], tf.float32))
    after = generator.get_weights()
    # By finite differences, with the critic as it is after its own steps.
    draws = keras.random.SeedGenerator(1)
    z = keras.random.normal((8, 2), seed=draws)

    def loss(kernel: np.ndarray) -> float:
        return -float(tf.reduce_mean(critic(tf.linalg.matmul(z, kernel) + before[1])))

    step = 1e-2
    for place in ((0, 0), (1, 1)):
        shift = np.zeros((2, 2), np.float32)
        shift[place] = step
        slope = (loss(before[0] + shift) - loss(before[0] - shift)) / (2 * step)
        moved = (before[0] - after[0])[place] / 0.1
        assert moved == pytest.approx(slope, rel=0.05, abs=1e-3)
