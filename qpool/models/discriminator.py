"""The seed's discriminator: a sample -> CV-QNN -> one number."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from qpool.models.network import QuantumNetwork
from qpool.models.readouts import Readout


@keras.saving.register_keras_serializable("qpool")
class QuantumSFDiscriminator(QuantumNetwork):
    """A discriminator, or critic, made of a CV quantum neural network.

    Samples of shape (batch, input_dim), float32 -> (batch, 1), float32: a trained linear
    combination of the read-out, without a bias (in a Wasserstein loss it would cancel). The number
    is a logit, or a critic's value: no function is put over it. With two modes and two layers it
    has 32 trainable scalars: 28 of the circuit and one for each quadrature.

    Args:
        n_modes: modes of the circuit.
        input_dim: width of a sample; which ones an encoding takes is said by its ``needs``.
        layers: layers of the circuit, each of two interferometers, squeezing, displacement, Kerr.
        cutoff_dim: the Fock states of a mode that are computed.
        encoding_strategy: how a sample gets into the circuit; see ``qpool.models.encodings``.
        seed: of the initial weights.
        readout: what is combined; see ``qpool.models.readouts``.

    Raises:
        ConfigurationError: an unknown encoding or read-out, or an input_dim that it cannot take.
    """

    def __init__(
        self,
        n_modes: int = 2,
        input_dim: int = 2,
        layers: int = 2,
        cutoff_dim: int = 8,
        encoding_strategy: str = "coherent_state",
        readout: str | Readout = "quadratures",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "input_dim",
            input_dim,
            n_modes,
            layers,
            cutoff_dim,
            encoding_strategy,
            readout,
            seed,
            **kwargs,
        )
        self.input_dim = input_dim
        self._combination = self.add_weight(
            shape=(math.prod(self._features), 1),
            initializer=keras.initializers.GlorotUniform(seed=seed),
            name="combination",
        )

    @property
    def features(self) -> tuple[int, ...]:
        """See ``QuantumNetwork``."""
        return (1,)

    def _output(self, state: Any, batch: Any) -> Any:
        features = super()._output(state, batch)
        features = tf.reshape(features, [-1, math.prod(self._features)])
        return features @ keras.ops.convert_to_tensor(self._combination)
