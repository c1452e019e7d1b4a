"""The adversarial step, as a ``keras.Model``: ``fit``, callbacks and checkpoints are Keras's.

Owns the losses and the order of updates, nothing else. The generator may be pooled or not.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


class QuantumGAN(keras.Model):
    """Generator against critic: Wasserstein loss with gradient penalty (Gulrajani et al., 2017).

    A step generates one batch, updates the critic ``critic_steps`` times on it and on the real
    batch, and then the generator once: a step costs one forward and one backward pass of the
    circuit, however many critic steps. The penalty is ``penalty`` times the mean of
    (|critic's gradient| - 1)^2 on random points between real and generated samples; it takes a
    second derivative of the critic, not of the generator.
    """

    def __init__(
        self,
        generator: Any,
        critic: Any,
        *,
        critic_steps: int = 5,
        penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name="quantum_gan")
        self.generator = generator
        self.critic = critic
        self.critic_steps = critic_steps
        self.penalty = penalty
        self._draws = keras.random.SeedGenerator(seed)
        self.built = True

    def compile(  # type: ignore[override]
        self, generator_optimizer: Any, critic_optimizer: Any, *, run_eagerly: bool = False
    ) -> None:
        """``run_eagerly`` for a generator that TensorFlow cannot trace (stock SF in place)."""
        super().compile(run_eagerly=run_eagerly)
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer

    def call(self, z: Any) -> Any:
        return self.generator(z)

    def latent(self, batch: int) -> Any:
        """(batch, latent_dim) draws from the standard normal distribution."""
        return keras.random.normal((batch, self.generator.latent_dim), seed=self._draws)

    def train_step(self, real: Any) -> dict[str, Any]:
        variables = [v.value for v in self.generator.trainable_variables]
        with tf.GradientTape() as tape:
            fake = self.generator(self.latent(tf.shape(real)[0]))
            for _ in range(self.critic_steps):
                with tape.stop_recording():
                    critic_loss = self._critic_step(real, tf.stop_gradient(fake))
            loss = -tf.reduce_mean(self.critic(fake))
        gradients = tape.gradient(loss, variables)
        self.generator_optimizer.apply_gradients(
            zip(gradients, self.generator.trainable_variables, strict=True)
        )
        return {
            "generator_loss": loss,
            "critic_loss": critic_loss,
            "gradient_norm": tf.linalg.global_norm(gradients),
        }

    def _critic_step(self, real: Any, fake: Any) -> Any:
        variables = [v.value for v in self.critic.trainable_variables]
        share = keras.random.uniform((tf.shape(real)[0], 1), seed=self._draws)
        between = share * real + (1.0 - share) * fake
        with tf.GradientTape() as tape:
            with tf.GradientTape() as slope_tape:
                slope_tape.watch(between)
                on_between = self.critic(between)
            slope = tf.norm(slope_tape.gradient(on_between, between), axis=-1)
            loss = (
                tf.reduce_mean(self.critic(fake))
                - tf.reduce_mean(self.critic(real))
                + self.penalty * tf.reduce_mean((slope - 1.0) ** 2)
            )
        gradients = tape.gradient(loss, variables)
        self.critic_optimizer.apply_gradients(
            zip(gradients, self.critic.trainable_variables, strict=True)
        )
        return loss


def default_critic(width: int, seed: int = 0) -> keras.Model:
    """A small classical critic: (batch, width) -> (batch, 1)."""
    initial = [keras.initializers.GlorotUniform(seed=seed + n) for n in range(3)]
    return keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dense(32, "leaky_relu", kernel_initializer=initial[0]),
            keras.layers.Dense(32, "leaky_relu", kernel_initializer=initial[1]),
            keras.layers.Dense(1, kernel_initializer=initial[2]),
        ],
        name="critic",
    )
