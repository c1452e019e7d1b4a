"""A continuous-variable quantum neural network as a Keras model: data in, a state, features out.

Owns the weights (a few named arrays, one row a layer) and how they and the data become a program's
arguments. How data enter is ``encodings``', what is read out ``readouts``', gates ``circuit``'s.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from qpool import programs, states
from qpool.models import circuit, encodings, readouts
from qpool.models.readouts import Readout
from qpool.models.saved import Saved
from workers.errors import ConfigurationError, InputError

#: Standard deviation of the initial active parameters: the state starts near its encoding.
_ACTIVE_SCALE = 0.1


class QuantumNetwork(Saved, keras.Model):
    """(batch, width) -> features of the state, for the models that people use.

    ``width_name`` is what the user calls the width: ``latent_dim`` or ``input_dim``.
    """

    def __init__(
        self,
        width_name: str,
        width: int,
        n_modes: int,
        layers: int,
        cutoff_dim: int,
        encoding_strategy: str,
        readout: str | Readout,
        seed: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("n_modes", n_modes), ("layers", layers)):
            if value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if cutoff_dim < 2:
            raise ConfigurationError(f"cutoff_dim must be at least 2, not {cutoff_dim}")
        encoding = encodings.find(encoding_strategy)
        if not encoding.fits(width, n_modes, layers):
            raise ConfigurationError(
                f"encoding_strategy={encoding_strategy!r} takes {encoding.needs}: it cannot have "
                f"{width_name}={width} with n_modes={n_modes}, layers={layers} "
                f"({encoding.formula})"
            )
        self._width_name = width_name
        self._width = width
        self.n_modes = n_modes
        self.n_layers = layers
        self.cutoff_dim = cutoff_dim
        self.encoding_strategy = encoding_strategy
        self._read = readouts.find(readout)
        self.readout = readout if isinstance(readout, str) else self._read
        self.seed = seed
        self._encoding = encoding
        self._features = self._read.shape(n_modes, cutoff_dim)
        self._chance = readouts.Chance(self._read.draws(n_modes), seed)
        self.program = circuit.build(n_modes, layers, lambda p, q: encoding.gates(p, q, width))
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
        self._mixing = encoding.layer(n_modes, seed)
        if self._mixing is not None:
            self._mixing.build((None, width))
        self.built = True

    def state(self, rows: Any) -> Any:
        """Strawberry Fields' state for (batch, width) rows, with a batch axis."""
        rows = tf.convert_to_tensor(rows)
        if rows.shape.rank != 2 or rows.shape[-1] != self._width:
            raise InputError(
                f"expected rows of shape (batch, {self._width}), as the model's "
                f"{self._width_name} says; came {tuple(rows.shape)}"
            )
        if self._mixing is not None:
            rows = self._mixing(rows)
        arguments = self._encoding.arguments(tf.unstack(rows, axis=1), self._parameters())
        dtype = tf.complex128 if self.compute_dtype == "float64" else tf.complex64
        return programs.state(self.program, arguments, self.cutoff_dim, dtype)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of what a call gives for one row."""
        return self._features

    #: Methods that are pooled with the call.
    pooled_methods = ("with_norm",)

    def with_norm(self, rows: Any) -> tuple[Any, Any]:
        """What a call gives, and the weight of each state inside the cutoff, (batch,)."""
        state = self.state(rows)
        norm = states.ket_norm(state)
        norm = norm if state.batched else norm[tf.newaxis]
        return self._output(state, tf.shape(rows)[0]), norm

    def call(self, rows: Any) -> Any:
        return self._output(self.state(rows), tf.shape(rows)[0])

    def _output(self, state: Any, batch: Any) -> Any:
        """What the model gives for ``batch`` rows, from their state."""
        return self._read(state, self._chance.draw(batch))

    def _parameters(self) -> dict[str, Any]:
        """The layers' parameters by the name that they have in the program."""
        return {
            circuit.parameter_name(name, n // weights.shape[1], n % weights.shape[1]): value
            for name, weights in self._blocks.items()
            for n, value in enumerate(tf.unstack(tf.reshape(weights, [-1])))
        }

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            self._width_name: self._width,
            "n_modes": self.n_modes,
            "layers": self.n_layers,
            "cutoff_dim": self.cutoff_dim,
            "encoding_strategy": self.encoding_strategy,
            "readout": readouts.as_config(self.readout),
            "seed": self.seed,
        }
