"""How data enter the circuit: the encodings, each with its formula, and a place for one's own.

An encoding adds gates ahead of the network's layers, shifts some of their parameters, or mixes the
data first. Owns those choices; the layers are ``circuit``'s.
"""

from __future__ import annotations

import abc
from typing import Any

from workers.errors import ConfigurationError, nearest


class Encoding(abc.ABC):
    """One way for rows of ``width`` numbers to enter a circuit.

    ``formula`` says what is done, for people; ``needs`` which widths it takes, for errors.
    """

    formula: str
    needs: str
    #: What latent vectors are drawn from: ``normal``, of standard deviation 1, or
    #: ``truncated_normal``, that one cut at two, where a number is the amplitude of a
    #: displacement, whose tails no training brings back into the cutoff.
    latent_distribution = "normal"

    @abc.abstractmethod
    def fits(self, width: int, modes: int, layers: int) -> bool:
        """Whether rows of that width can enter."""

    @abc.abstractmethod
    def width(self, modes: int, layers: int) -> int:
        """The width to take where nothing else decides it."""

    def layer(self, modes: int, seed: int | None) -> Any:
        """A Keras layer that the rows pass first; None for none. Its weights are trained."""
        return None

    def gates(self, program: Any, q: Any, width: int) -> None:  # noqa: B027 - optional
        """Add gates to the program, within its context; ``width`` is what the user gave."""

    def arguments(self, columns: list[Any], weights: dict[str, Any]) -> dict[str, Any]:
        """The program's arguments from the rows' columns and the layers' parameters by name.

        ``columns`` are (batch,) each, or scalars for a batch of one.
        """
        return {**weights, **{f"z_{n}": column for n, column in enumerate(columns)}}


class CoherentState(Encoding):
    """A coherent state in each mode, at a point of phase space."""

    formula = (
        "Z(z_2k+1) X(z_2k) |0> on mode k: at x = z_2k, p = z_2k+1; with n_modes numbers X(z_k) |0>"
    )
    needs = "2 n_modes numbers (x and p), or n_modes (x)"

    def fits(self, width: int, modes: int, layers: int) -> bool:
        return width in (modes, 2 * modes)

    def width(self, modes: int, layers: int) -> int:
        return 2 * modes

    def gates(self, program: Any, q: Any, width: int) -> None:
        from strawberryfields import ops

        # In Cartesian parts: Dgate's polar form has no gradient at z = 0.
        for mode in range(len(q)):
            if width == len(q):
                ops.Xgate(program.params(f"z_{mode}")) | q[mode]
            else:
                ops.Xgate(program.params(f"z_{2 * mode}")) | q[mode]
                ops.Zgate(program.params(f"z_{2 * mode + 1}")) | q[mode]


class DirectDisplacement(Encoding):
    """The number itself is the displacement's amplitude."""

    formula = "D(z_k) |0> on mode k"
    needs = "n_modes numbers"
    latent_distribution = "truncated_normal"

    def fits(self, width: int, modes: int, layers: int) -> bool:
        return width == modes

    def width(self, modes: int, layers: int) -> int:
        return modes

    def gates(self, program: Any, q: Any, width: int) -> None:
        from strawberryfields import ops

        for mode in range(len(q)):
            ops.Dgate(program.params(f"z_{mode}")) | q[mode]


class Angle(DirectDisplacement):
    """The number is a phase. The vacuum has none, so a coherent state is turned."""

    formula = "R(z_k) D(1) |0> on mode k: amplitude 1, phase z_k"
    latent_distribution = "normal"

    def gates(self, program: Any, q: Any, width: int) -> None:
        from strawberryfields import ops

        for mode in range(len(q)):
            ops.Dgate(1.0) | q[mode]
            ops.Rgate(program.params(f"z_{mode}")) | q[mode]


class SparseParameter(Encoding):
    """The data shift a few of the network's parameters: of each layer, the displacements."""

    formula = "in layer l, mode k, displacement_r[l, k] + z_(l n_modes + k) in place of the weight"
    needs = "1 to n_modes * layers numbers"
    latent_distribution = "truncated_normal"

    def fits(self, width: int, modes: int, layers: int) -> bool:
        return 1 <= width <= modes * layers

    def width(self, modes: int, layers: int) -> int:
        return modes * layers

    def arguments(self, columns: list[Any], weights: dict[str, Any]) -> dict[str, Any]:
        shifted = [name for name in weights if name.startswith("displacement_r_")]
        sums = {
            name: weights[name] + column for name, column in zip(shifted, columns, strict=False)
        }
        return {**weights, **sums}


class ClassicalNeural(CoherentState):
    """A trained classical layer mixes the data into a point of phase space of each mode."""

    formula = "coherent_state of 2 tanh(W z + b), with trained W and b"
    needs = "any number of numbers"

    def fits(self, width: int, modes: int, layers: int) -> bool:
        return width >= 1

    def layer(self, modes: int, seed: int | None) -> Any:
        import keras

        initial = keras.initializers.GlorotUniform(seed=seed)
        return keras.layers.Dense(2 * modes, "tanh", kernel_initializer=initial, name="mixing")

    def arguments(self, columns: list[Any], weights: dict[str, Any]) -> dict[str, Any]:
        return super().arguments([2.0 * column for column in columns], weights)

    def gates(self, program: Any, q: Any, width: int) -> None:
        super().gates(program, q, 2 * len(q))


ENCODINGS: dict[str, Encoding] = {
    "coherent_state": CoherentState(),
    "direct_displacement": DirectDisplacement(),
    "angle_encoding": Angle(),
    "sparse_parameter": SparseParameter(),
    "classical_neural": ClassicalNeural(),
}


def register_encoding(name: str, encoding: Encoding) -> None:
    """Make ``encoding`` known under ``name``, for ``encoding_strategy=``.

    It is known to this process. A model that is pooled takes its encoding along; a factory that is
    pooled runs in the workers, and has to register it there.

    Raises:
        ConfigurationError: it is no ``Encoding``, or the name is taken by another one.
    """
    if not isinstance(encoding, Encoding):
        raise ConfigurationError(
            f"an encoding is an instance of qpool.models.Encoding; came {type(encoding).__name__}"
        )
    if type(ENCODINGS.get(name, encoding)) is not type(encoding):
        raise ConfigurationError(
            f"encoding_strategy {name!r} is {type(ENCODINGS[name]).__name__} already; take another "
            "name"
        )
    ENCODINGS[name] = encoding


def find(name: str) -> Encoding:
    """The encoding of that name; ConfigurationError names the nearest."""
    try:
        return ENCODINGS[name]
    except (KeyError, TypeError):
        raise ConfigurationError(
            f"unknown encoding_strategy {name!r}: {nearest(str(name), tuple(ENCODINGS))}"
        ) from None
