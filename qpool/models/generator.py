"""The seed's generator: latent vector -> CV-QNN -> features."""

from __future__ import annotations

from typing import Any

import keras

from qpool.models.network import QuantumNetwork
from qpool.models.readouts import Readout


@keras.saving.register_keras_serializable("qpool")
class QuantumSFGenerator(QuantumNetwork):
    """A generator whose samples are expectation values of a CV quantum neural network's state.

    z of shape (batch, latent_dim), float32 -> samples of shape (batch, n_modes), float32: with the
    default read-out the mean of the position quadrature x of each mode, with hbar = 2 (SF's
    default; the vacuum has variance 1). Other read-outs have other shapes.

    Args:
        n_modes: modes, and the width of a sample.
        latent_dim: width of z; which ones an encoding takes is said by its ``needs``.
        layers: CV-QNN layers (14 parameters each for two modes).
        cutoff_dim: Fock states kept per mode.
        encoding_strategy: how z enters; see ``qpool.models.encodings``.
        readout: what a sample is; see ``qpool.models.readouts``.
        seed: of the initial weights.

    Raises:
        ConfigurationError: an unknown encoding or read-out, or a latent_dim that it cannot take.
    """

    def __init__(
        self,
        n_modes: int = 2,
        latent_dim: int = 4,
        layers: int = 2,
        cutoff_dim: int = 8,
        encoding_strategy: str = "coherent_state",
        readout: str | Readout = "positions",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "latent_dim",
            latent_dim,
            n_modes,
            layers,
            cutoff_dim,
            encoding_strategy,
            readout,
            seed,
            **kwargs,
        )
        self.latent_dim = latent_dim

    @property
    def latent_distribution(self) -> str:
        """What z is drawn from in training: see ``qpool.models.encodings.Encoding``."""
        return self._encoding.latent_distribution
