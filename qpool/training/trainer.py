"""Generator, critic and data, put together: the seed's trainer over Keras's ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from qpool.generator import ParallelGenerator, parallelize
from qpool.training import data
from qpool.training.gan import QuantumGAN, default_critic
from workers.errors import ConfigurationError


class QuantumGANTrainer:
    """Trains a quantum generator against a classical critic.

    Args:
        generator: a model with ``latent_dim``, callable on z; pooled already or not.
        critic: a Keras model (batch, width) -> (batch, 1); default: a small one.
        generator_rate, critic_rate: Adam's learning rates (beta_1 = 0.5).
        critic_steps, penalty: see :class:`qpool.training.gan.QuantumGAN`.
        seed: of latent draws, shuffling and the default critic.
        options: further keyword arguments of :func:`qpool.parallelize`, for a generator that is
            not pooled yet; ``train`` does it.
    """

    def __init__(
        self,
        generator: Any,
        critic: Any = None,
        *,
        generator_rate: float = 0.01,
        critic_rate: float = 0.01,
        critic_steps: int = 5,
        penalty: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name, value in (("generator_rate", generator_rate), ("critic_rate", critic_rate)):
            if not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {value}")
        if critic_steps < 1:
            raise ConfigurationError(f"critic_steps must be at least 1, not {critic_steps}")
        self.generator = generator
        self.critic = critic
        self.gan: QuantumGAN | None = None
        self._rates = (generator_rate, critic_rate)
        self._critic_steps = critic_steps
        self._penalty = penalty
        self._seed = seed
        self._options = options

    def train(
        self,
        real_data: Any,
        epochs: int,
        batch_size: int = 32,
        strategy: str = "auto",
        callbacks: Sequence[Any] = (),
    ) -> keras.callbacks.History:
        """Train for ``epochs`` passes over ``real_data``, (samples, width) rows of numbers.

        Rows that do not fill a batch are left for another epoch (each shuffles anew). Returns
        Keras's History. DataError for data that cannot be used, before any worker starts.
        """
        rows: np.ndarray = data.check(real_data, batch_size=batch_size).astype(np.float32)
        if epochs < 1 or batch_size < 1:
            raise ConfigurationError(
                f"epochs and batch_size must be at least 1, not {epochs} and {batch_size}"
            )
        if not isinstance(self.generator, ParallelGenerator):
            self.generator = parallelize(self.generator, strategy=strategy, **self._options)
        if self.gan is None:
            critic = self.critic or default_critic(rows.shape[1], self._seed)
            self.critic = critic
            self.gan = QuantumGAN(
                self.generator,
                critic,
                critic_steps=self._critic_steps,
                penalty=self._penalty,
                seed=self._seed,
            )
            self.gan.compile(
                *(keras.optimizers.Adam(rate, beta_1=0.5) for rate in self._rates),
                run_eagerly=self.generator.stats()["strategy"] == "sequential",
            )
        batches = (
            tf.data.Dataset.from_tensor_slices(rows)
            .shuffle(len(rows), seed=self._seed)
            .batch(batch_size, drop_remainder=True)
        )
        return self.gan.fit(
            batches, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks)
        )

    def close(self) -> None:
        """Close the generator's pool."""
        if isinstance(self.generator, ParallelGenerator):
            self.generator.close()

    def __enter__(self) -> QuantumGANTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
