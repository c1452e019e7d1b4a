"""What is read out of a state: expectation values, samples, densities. Each has a formula.

Owns those, each a ``Readout``. All are differentiable, and none adds noise that is not
physics. hbar is Strawberry Fields' (2 unless set): the vacuum's x has variance hbar / 2.
"""

from __future__ import annotations

import abc
import functools
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from qpool import phase_space
from workers.errors import ConfigurationError, nearest
from workers.tensors import squared_modulus

#: Points of the grid on which a homodyne sample is first looked for, and Newton steps after it.
_GRID, _STEPS = 512, 3


class Readout(abc.ABC):
    """One way to read a state out; ``formula`` says it, for people."""

    formula: str

    @abc.abstractmethod
    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        """The shape of what is read of one sample."""

    @abc.abstractmethod
    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        """Read a ``FockStateTF``: (batch, *shape), a batch of one for a state without a batch axis.

        ``uniforms`` are (batch, ``draws``) draws from [0, 1), None for a readout without any.
        """

    def draws(self, modes: int) -> int:
        """How many random numbers a sample takes."""
        return 0

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras to save."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Readout:
        return cls(**config)


class Positions(Readout):
    """Means of the position quadratures."""

    formula = "<x_k> for each mode k"

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        return (modes,)

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        return _columns(state.quad_expectation(mode)[0] for mode in range(state.num_modes))


class Quadratures(Readout):
    """Means of both quadratures."""

    formula = "<x_0>, <p_0>, <x_1>, ..."

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        return (2 * modes,)

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        # A plain number would be rounded to single precision: p would be a little of x.
        angles = [tf.constant(phi, state.dtype.real_dtype) for phi in (0.0, math.pi / 2)]
        return _columns(
            state.quad_expectation(mode, phi)[0]
            for mode in range(state.num_modes)
            for phi in angles
        )


class Photons(Readout):
    """Mean photon numbers."""

    formula = "<n_k> for each mode k"

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        return (modes,)

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        return _columns(state.mean_photon(mode)[0] for mode in range(state.num_modes))


class Ket(Readout):
    """The state itself."""

    formula = "<n_0, n_1, ...|psi>, complex"

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        return (cutoff,) * modes

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        if not state.is_pure:
            raise ConfigurationError(
                "readout='ket' needs a pure state; this program has a channel in it (loss, say)"
            )
        return _batched(state)


@keras.saving.register_keras_serializable("qpool")
class Homodyne(Readout):
    """Samples of a homodyne measurement of every mode, as functions of uniform draws.

    The samples follow the joint distribution: each mode is drawn from its marginal, and the state
    of the others conditioned on what came. A sample is x = F^-1(u), with F the distribution
    function in closed form, so that it has the derivative -(dF/dw) / F'(x) with respect to all
    that the state depends on (the reparametrised, or pathwise, gradient). ``phi`` is the angle of
    the quadrature cos(phi) x + sin(phi) p.
    """

    formula = "one draw of x_phi for each mode, jointly"

    def __init__(self, phi: float = 0.0) -> None:
        self.phi = phi

    def get_config(self) -> dict[str, Any]:
        return {"phi": self.phi}

    def draws(self, modes: int) -> int:
        return modes

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        return (modes,)

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        cutoff, modes = state.cutoff_dim, state.num_modes
        left = _batched(state)  # of a mixed state two axes a mode, side by side
        turn = np.exp(-1j * self.phi * np.arange(cutoff)).astype(left.dtype.as_numpy_dtype)
        axes = [turn] if state.is_pure else [turn, turn.conj()]
        found = []
        for mode in range(modes):
            density = tf.math.real(
                _first_mode(left, cutoff, len(axes)) * np.outer(turn, turn.conj())
            )
            x = _quantile(density, tf.cast(uniforms[:, mode], density.dtype))
            found.append(x)
            psi = tf.cast(phase_space.wave_functions(x, cutoff), left.dtype)
            for phases in axes:  # what the outcome leaves of the others
                flat = tf.reshape(left, [-1, cutoff, math.prod(left.shape[2:])])
                rest = tf.einsum("bn,bnr->br", psi * phases, flat)
                left = tf.reshape(rest, [-1, *left.shape[2:]])
        return _in_units(tf.stack(found, axis=1))


@keras.saving.register_keras_serializable("qpool")
class Density(Readout):
    """The joint density of positions on a grid, ancilla modes traced out.

    The first ``n_modes - ancillas`` modes are kept; each has ``points`` equidistant positions from
    ``low`` to ``high``. The density integrates to the state's norm within the cutoff and the grid:
    it is not scaled to 1, so that what leaks out is seen.
    """

    formula = "p(x_0, ..., x_k) on a grid, the last modes traced out"

    def __init__(
        self, low: float = -4.0, high: float = 4.0, points: int = 40, ancillas: int = 0
    ) -> None:
        if not low < high or points < 2 or ancillas < 0:
            raise ConfigurationError(
                "a density needs low < high, at least 2 points and no fewer than 0 ancillas; came "
                f"{low}, {high}, {points}, {ancillas}"
            )
        self.low, self.high, self.points, self.ancillas = low, high, points, ancillas

    @property
    def grid(self) -> np.ndarray:
        """The positions along each axis: (points,), float64."""
        return np.linspace(self.low, self.high, self.points)

    def get_config(self) -> dict[str, Any]:
        names = ("low", "high", "points", "ancillas")
        return {name: getattr(self, name) for name in names}

    def shape(self, modes: int, cutoff: int) -> tuple[int, ...]:
        if self.ancillas >= modes:
            raise ConfigurationError(
                f"a density of {modes} mode(s) cannot trace out {self.ancillas}: expected fewer "
                "ancillas than modes"
            )
        return (self.points,) * (modes - self.ancillas)

    def __call__(self, state: Any, uniforms: Any = None) -> Any:
        cutoff, modes = state.cutoff_dim, state.num_modes
        shape = self.shape(modes, cutoff)
        scale = math.sqrt(_hbar())
        psi = phase_space.wave_functions(tf.constant(self.grid / scale), cutoff) / math.sqrt(scale)
        left = _batched(state)
        if not state.is_pure:
            left = state.reduced_dm(list(range(len(shape)))) if self.ancillas else left
            left = left if state.batched else left[None] if self.ancillas else left
            pairs = tf.cast(psi[:, :, None] * psi[:, None, :], left.dtype)
            for _ in shape:  # each mode's two axes to the back, as one of positions
                left = tf.einsum("bnm...,gnm->b...g", left, pairs)
            return tf.math.real(left)
        for _ in shape:
            left = tf.einsum("bn...,gn->b...g", left, tf.cast(psi, left.dtype))
        if self.ancillas:  # they are in front now
            left = tf.reshape(left, [-1, cutoff**self.ancillas, *shape])
            return tf.reduce_sum(squared_modulus(left), axis=1)
        return squared_modulus(left)


READOUTS: dict[str, Readout] = {
    "positions": Positions(),
    "quadratures": Quadratures(),
    "photons": Photons(),
    "homodyne": Homodyne(),
    "density": Density(),
    "ket": Ket(),
}


def find(readout: str | Readout) -> Readout:
    """The read-out of that name, or the one given; ConfigurationError names the nearest."""
    if isinstance(readout, dict):
        readout = keras.saving.deserialize_keras_object(readout)
    if isinstance(readout, Readout):
        return readout
    try:
        return READOUTS[readout]
    except (KeyError, TypeError):
        raise ConfigurationError(
            f"unknown readout {readout!r}: {nearest(str(readout), tuple(READOUTS))}, or pass a "
            "qpool.models.Readout"
        ) from None


def as_config(readout: str | Readout) -> Any:
    """A name as it is; a read-out as Keras saves one."""
    return readout if isinstance(readout, str) else keras.saving.serialize_keras_object(readout)


class Chance(keras.Layer):
    """Where the draws of a read-out come from: (batch, count) uniform ones, None for none.

    A layer, so that Keras saves where it stands and the pool seeds it for each tile.
    """

    def __init__(self, count: int, seed: int | None = None) -> None:
        super().__init__(name="chance")
        self.count = count
        self.source = keras.random.SeedGenerator(seed) if count else None
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        """See ``keras.Layer``: a generator's state is not among a layer's variables."""
        if self.source is not None:
            store["state"] = keras.ops.convert_to_numpy(self.source.state)

    def load_own_variables(self, store: Any) -> None:
        """See ``keras.Layer``."""
        if self.source is not None:
            self.source.state.assign(store["state"])

    def draw(self, batch: Any) -> Any:
        """``batch`` rows of draws from [0, 1)."""
        if self.source is None:
            return None
        return keras.random.uniform((batch, self.count), seed=self.source)


def _columns(values: Any) -> Any:
    """Expectation values, (batch,) or scalar each, as columns: (batch, number of values)."""
    columns = tf.stack([tf.math.real(value) for value in values], axis=-1)
    return columns if columns.shape.rank == 2 else columns[tf.newaxis]


def _batched(state: Any) -> Any:
    """The ket or density matrix, (batch, D, ...)."""
    return state.data if state.batched else state.data[tf.newaxis]


def _hbar() -> float:
    import strawberryfields as sf

    return float(sf.hbar)


def _in_units(x: Any) -> Any:
    return x * math.sqrt(_hbar())


def _first_mode(state: Any, cutoff: int, sides: int) -> Any:
    """The first mode's density matrix, (batch, D, D), of (batch, D, ...), not normalised."""
    if sides == 1:
        flat = tf.reshape(state, [-1, cutoff, math.prod(state.shape[2:])])
        return tf.matmul(flat, flat, adjoint_b=True)
    while state.shape.rank > 3:
        state = tf.linalg.trace(state)
    return state


def _quantile(density: Any, u: Any) -> Any:
    """x with F(x) = u, in dimensionless units, for p(x) = psi(x)^T density psi(x) / trace.

    ``density`` is (batch, D, D), real, ``u`` (batch,). Once x is found it is computed again by two
    Newton steps, which have its first and second derivatives.
    """
    cutoff = density.shape[-1]
    target = u * tf.linalg.trace(density)

    def miss(x: Any) -> Any:
        below = phase_space.overlaps_below(x, cutoff)
        return tf.reduce_sum(below * density, axis=(1, 2)) - target

    def slope(x: Any) -> Any:
        psi = phase_space.wave_functions(x, cutoff)
        found = tf.einsum("bm,bmn,bn->b", psi, density, psi)
        return tf.maximum(found, density.dtype.as_numpy_dtype(1e-12))  # at a node of the density

    grid, overlaps = _grid(cutoff)
    grid, overlaps = (tf.constant(x, density.dtype) for x in (grid, overlaps))
    flat = tf.reshape(tf.stop_gradient(density), [-1, cutoff**2])
    misses = tf.matmul(flat, overlaps) - tf.stop_gradient(target)[:, None]
    place = tf.reduce_sum(tf.cast(misses <= 0, tf.int32), axis=1) - 1
    place = tf.clip_by_value(place, 0, _GRID - 2)
    low, high = tf.gather(grid, place), tf.gather(grid, place + 1)
    at_low, at_high = (tf.gather(misses, place + n, batch_dims=1) for n in (0, 1))
    gap = at_high - at_low
    x = tf.where(gap > 0, low - at_low * (high - low) / tf.where(gap > 0, gap, 1.0), low)
    x = tf.clip_by_value(x, low, high)
    for _ in range(_STEPS):
        x = tf.clip_by_value(x - miss(x) / slope(x), low, high)
    x = tf.stop_gradient(x)
    for _ in range(2):
        x = x - miss(x) / slope(x)
    return x


@functools.cache
def _grid(cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that cover the Fock states below the cutoff, (G,), and overlaps, (D * D, G)."""
    reach = math.sqrt(2 * cutoff + 1) + 5
    grid = np.linspace(-reach, reach, _GRID)
    with tf.init_scope():
        overlaps = phase_space.overlaps_below(tf.constant(grid), cutoff).numpy()
    return grid, overlaps.reshape(_GRID, -1).T
