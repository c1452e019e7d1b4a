"""The seed's generator: latent vector -> CV-QNN -> mean quadratures."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from qpool.models import circuit, encodings
from workers import sf_compat
from workers.errors import ConfigurationError, InputError

#: Standard deviation of the initial active parameters: the state starts near its encoding.
_ACTIVE_SCALE = 0.1


@keras.saving.register_keras_serializable("qpool")
class QuantumSFGenerator(keras.Model):
    """A generator whose samples are mean quadratures of a CV quantum neural network.

    z of shape (batch, latent_dim), float32 -> samples of shape (batch, n_modes), float32: the
    mean of the position quadrature x of each mode, with hbar = 2 (SF's default; the vacuum has
    variance 1).

    Args:
        n_modes: modes, and the width of a sample.
        latent_dim: width of z; what the encoding needs (``coherent_state``: 2 n_modes,
            ``direct_displacement``: n_modes).
        layers: CV-QNN layers (14 parameters each for two modes).
        cutoff_dim: Fock states kept per mode.
        encoding_strategy: how z enters; see ``qpool.models.encodings``.
        seed: of the initial weights.

    Raises:
        ConfigurationError: an unknown encoding, or a latent_dim that it cannot use.
    """

    def __init__(
        self,
        n_modes: int = 2,
        latent_dim: int = 4,
        layers: int = 2,
        cutoff_dim: int = 8,
        encoding_strategy: str = "coherent_state",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("n_modes", n_modes), ("layers", layers)):
            if value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if cutoff_dim < 2:
            raise ConfigurationError(f"cutoff_dim must be at least 2, not {cutoff_dim}")
        encoding = encodings.find(encoding_strategy)
        if latent_dim != encoding.width(n_modes):
            raise ConfigurationError(
                f"encoding_strategy={encoding_strategy!r} with n_modes={n_modes} needs "
                f"latent_dim={encoding.width(n_modes)}, not {latent_dim} ({encoding.formula})"
            )
        self.n_modes = n_modes
        self.latent_dim = latent_dim
        self.n_layers = layers
        self.cutoff_dim = cutoff_dim
        self.encoding_strategy = encoding_strategy
        self.seed = seed
        self._program = circuit.build(n_modes, layers, encoding.encode)
        self._blocks = {}
        for place, block in enumerate(circuit.BLOCKS):
            size = block.size(n_modes)
            if size == 0:
                continue
            start = None if seed is None else seed + place
            initializer = (
                keras.initializers.RandomNormal(stddev=_ACTIVE_SCALE, seed=start)
                if block.active
                else keras.initializers.RandomUniform(0.0, 6.283185307179586, seed=start)
            )
            self._blocks[block.name] = self.add_weight(
                shape=(layers, size), initializer=initializer, name=block.name, trainable=True
            )
        self.built = True

    def call(self, z: Any) -> Any:
        if z.shape[-1] != self.latent_dim:
            raise InputError(f"expected z of shape (batch, {self.latent_dim}), came {z.shape}")
        batch = z.shape[0]
        args = {f"z_{n}": z[:, n] if batch > 1 else z[0, n] for n in range(self.latent_dim)}
        for name, weights in self._blocks.items():
            rows = tf.unstack(tf.reshape(weights, [-1]))
            size = weights.shape[1]
            for n, value in enumerate(rows):
                args[circuit.parameter_name(name, n // size, n % size)] = value
        engine = self._engine(batch)
        state = engine.run(self._program, args=args).state
        means = [state.quad_expectation(mode)[0] for mode in range(self.n_modes)]
        return tf.reshape(tf.stack(means, axis=-1), (batch, self.n_modes))

    def _engine(self, batch: int) -> Any:
        """A blank engine for that batch size; Strawberry Fields fixes it when one is made."""
        sf_compat.install()
        import strawberryfields as sf

        options: dict[str, Any] = {"cutoff_dim": self.cutoff_dim}
        if batch > 1:
            options["batch_size"] = batch
        return sf.Engine("tf", backend_options=options)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "n_modes": self.n_modes,
            "latent_dim": self.latent_dim,
            "layers": self.n_layers,
            "cutoff_dim": self.cutoff_dim,
            "encoding_strategy": self.encoding_strategy,
            "seed": self.seed,
        }
