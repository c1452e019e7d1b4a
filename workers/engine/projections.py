"""Measurement: outcomes, drawn or asked for, and the state that is left of the other modes.

Owns the vectors that outcomes are projections onto, the projection with its norm, and the draws.
All of it is TensorFlow's, so that what is heralded can be trained through, the norm included; an
outcome that is drawn is a constant to a gradient, as in Strawberry Fields. Knows nothing of
programs; amplitudes are ([batch,] D, ...), a density matrix has two axes a mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.special import gammaln

from workers.context import during
from workers.engine import gates
from workers.tensors import matmul

#: Positions at which the distribution of a quadrature is looked up, to be drawn from.
_GRID = 2048

#: Whether outcomes are drawn here in eager calls too, as they are in graphs.
_everywhere: ContextVar[bool] = ContextVar("everywhere", default=False)


def drawing() -> AbstractContextManager[Any]:
    """Within, an eager call draws outcomes as its trace does; elsewhere as Strawberry Fields."""
    return during(_everywhere, True)


def drawn_here() -> bool:
    """Whether a measurement's outcome is to be drawn by what follows."""
    return _everywhere.get() or not tf.executing_eagerly()


def number_state(n: tf.Tensor, cutoff: int, dtype: tf.DType) -> tf.Tensor:
    """The Fock state |n>: (...) -> (..., cutoff). Zero, where n is not below the cutoff."""
    return tf.one_hot(n, cutoff, dtype=dtype)


def quadrature_state(
    phi: tf.Tensor, x: tf.Tensor, cutoff: int, dtype: tf.DType, hbar: float
) -> tf.Tensor:
    """The eigenstate of cos(phi) x + sin(phi) p for the value x, but for its norm.

    It is Strawberry Fields': infinitely squeezed vacuum, cut at the cutoff, then displaced by the
    matrix that is cut there too, then rotated. ``phi`` and ``x`` are scalars or (batch,).
    """
    n = np.arange(cutoff)
    half: np.ndarray = n // 2
    size = np.exp(0.5 * gammaln(n + 1) - gammaln(half + 1) - half * np.log(2.0))
    squeezed = np.where(n % 2 == 0, (-1.0) ** half * size, 0.0)
    r = tf.cast(x, gates.FLOAT) * np.sqrt(0.5 / hbar)
    displacement = gates.displacement_by_columns(r, cutoff)  # which a loop over rows may hold
    ket = tf.linalg.matvec(displacement, tf.constant(squeezed, gates.FLOAT))
    angle = tf.cast(phi, gates.FLOAT)[..., None] * n
    ket, angle = ket + tf.zeros_like(angle), angle + tf.zeros_like(ket)
    return tf.cast(tf.complex(ket * tf.cos(angle), ket * tf.sin(angle)), dtype)


def draw_numbers(state: tf.Tensor, modes: Sequence[int], batch: Any, *, pure: bool) -> tf.Tensor:
    """Photon numbers of ``modes``, drawn from their joint distribution: (batch, modes), int64.

    ``state`` is (batch, D, ...), with a ``batch`` that its shape need not say.
    """
    state = tf.stop_gradient(state)
    cutoff, rank = state.shape[-1], len(state.shape) - 1
    if pure:
        weights = tf.abs(state) ** 2
    else:
        weights = tf.math.real(tf.linalg.diag_part(_as_matrices(state)))
        weights = tf.reshape(weights, [-1, *[cutoff] * (rank // 2)])
    others = [n for n in range(1, len(weights.shape)) if n - 1 not in modes]
    weights = tf.reshape(tf.reduce_sum(weights, others), [-1, cutoff ** len(modes)])
    index, _ = _draw(weights, batch)
    strides = cutoff ** np.arange(len(modes) - 1, -1, -1)
    return (tf.cast(index, tf.int64)[:, None] // strides) % cutoff


def draw_quadrature(
    state: tf.Tensor, mode: int, phi: tf.Tensor, batch: Any, hbar: float, *, pure: bool
) -> tf.Tensor:
    """A value of cos(phi) x + sin(phi) p of a mode, drawn from its distribution: (batch,), float64.

    Its density is psi^T rho psi, psi the wave functions of the Fock states; the distribution
    function is taken to be straight between neighbours of a fine grid that covers all of them.
    ``phi`` is a scalar or (batch,). What is drawn has no gradient, as in Strawberry Fields.
    """
    rho, phi = _reduced(tf.stop_gradient(state), mode, pure=pure), tf.stop_gradient(phi)
    cutoff = rho.shape[-1]
    grid, products = _wave_functions(cutoff)
    turns = tf.cast(phi, gates.FLOAT)[..., None] * np.arange(cutoff)
    turns = turns + tf.zeros([1, cutoff], gates.FLOAT)
    turned = tf.complex(tf.cos(turns), -tf.sin(turns))
    rho = tf.math.real(
        tf.cast(rho, tf.complex128) * turned[:, :, None] * tf.math.conj(turned)[:, None]
    )
    weights = matmul(tf.reshape(rho, [-1, cutoff**2]), products)
    index, share = _draw(weights, batch)
    step = grid[1] - grid[0]
    x = tf.gather(tf.constant(grid - step / 2), index) + share * step
    return x * np.sqrt(hbar)


def _draw(weights: tf.Tensor, batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Which of the entries, by their weights, and how far into it: of (batch, n), (batch,) each."""
    weights = tf.maximum(tf.cast(weights, gates.FLOAT), 0.0)  # rounding may leave less
    below = tf.cumsum(weights, axis=1)
    target = tf.random.uniform([batch], dtype=gates.FLOAT) * below[:, -1]
    index = tf.reduce_sum(tf.cast(below <= target[:, None], tf.int32), axis=1)
    index = tf.minimum(index, weights.shape[1] - 1)
    chosen = tf.one_hot(index, weights.shape[1], dtype=gates.FLOAT)
    weight = tf.reduce_sum(chosen * weights, axis=1)
    before = tf.reduce_sum(chosen * below, axis=1) - weight
    share = (target - before) / tf.where(weight > 0, weight, tf.ones_like(weight))
    return index, tf.clip_by_value(share, 0.0, 1.0)


def _reduced(state: tf.Tensor, mode: int, *, pure: bool) -> tf.Tensor:
    """A mode's density matrix: (batch, D, D)."""
    cutoff, rank = state.shape[-1], len(state.shape) - 1
    if pure:
        others = [n for n in range(1, rank + 1) if n != mode + 1]
        flat = tf.transpose(state, [0, mode + 1, *others])
        flat = tf.reshape(flat, [-1, cutoff, cutoff ** (rank - 1)])
        return matmul(flat, flat, adjoint_b=True)
    own = [2 * mode + 1, 2 * mode + 2]
    left = [n for n in range(1, rank + 1) if n not in own]
    moved = tf.transpose(state, [0, *own, *left[::2], *left[1::2]])
    size = cutoff ** (rank // 2 - 1)
    return tf.linalg.trace(tf.reshape(moved, [-1, cutoff, cutoff, size, size]))


def _as_matrices(state: tf.Tensor) -> tf.Tensor:
    """Density matrices with their kets' axes in front: (batch, D^modes, D^modes)."""
    rank = len(state.shape) - 1
    pairs = tf.transpose(state, [0, *range(1, rank + 1, 2), *range(2, rank + 1, 2)])
    size = state.shape[-1] ** (rank // 2)
    return tf.reshape(pairs, [-1, size, size])


def wave_functions(x: Any, gaussian: Any, cutoff: int) -> list[Any]:
    """psi_n(x) of the Fock states n < cutoff in units of sqrt(hbar), from exp(-x^2 / 2): arrays or
    tensors, as they are given.

    By psi_(n+1) = sqrt(2 / (n+1)) x psi_n - sqrt(n / (n+1)) psi_(n-1), which is stable upwards.
    """
    psi = [math.pi**-0.25 * gaussian]
    for n in range(cutoff - 1):
        psi.append(math.sqrt(2 / (n + 1)) * x * psi[n])
        if n:
            psi[n + 1] -= math.sqrt(n / (n + 1)) * psi[n - 1]
    return psi


@functools.cache
def _wave_functions(cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in units of sqrt(hbar) that cover the Fock states below the cutoff, (G,), and the
    products there of their wave functions, two at a time, (D * D, G)."""
    reach = np.sqrt(2 * cutoff + 1) + 5
    grid = np.linspace(-reach, reach, _GRID)
    found = np.stack(wave_functions(grid, np.exp(-(grid**2) / 2), cutoff))
    return grid, (found[:, None] * found).reshape(cutoff**2, -1)


def project(
    state: tf.Tensor, vectors: Sequence[tf.Tensor], modes: Sequence[int], *, pure: bool
) -> tf.Tensor:
    """What is left of a batch of states, normalised, with the modes that were measured in vacuum.

    Args:
        state: (batch, D, ...).
        vectors: for each of ``modes``, ([batch,] D).
        modes: in increasing order, not all there are.
        pure: whether the state is a ket.
    """
    cutoff, each = state.shape[-1], 1 if pure else 2
    for mode, vector in sorted(zip(modes, vectors, strict=True), key=lambda pair: -pair[0]):
        for side in reversed(range(each)):  # the bra of a density matrix before its ket
            bra = vector if side else tf.math.conj(vector)
            state = _contract(state, bra, 1 + each * mode + side)
    rank = len(state.shape) - 1
    if pure:
        norm = tf.sqrt(tf.reduce_sum(tf.abs(state) ** 2, range(1, rank + 1)))
    else:
        norm = tf.math.real(tf.linalg.trace(_as_matrices(state)))
    norm = tf.reshape(norm, [-1, *[1] * rank])
    state = state / tf.complex(norm, tf.zeros_like(norm))
    for mode in modes:
        for side in range(each):
            axis = 1 + each * mode + side
            state = tf.expand_dims(state, axis)
            paddings = [[0, 0]] * len(state.shape)
            paddings[axis] = [0, cutoff - 1]
            state = tf.pad(state, paddings)
    return state


def _contract(state: tf.Tensor, vector: tf.Tensor, axis: int) -> tf.Tensor:
    """The sum over an axis, weighted by a vector (D,) or by one for each sample (batch, D)."""
    rank = len(state.shape)
    others = [n for n in range(1, rank) if n != axis]
    moved = tf.transpose(state, [0, *others, axis])
    shape = [-1, *(state.shape[n] for n in others)]
    flat = tf.reshape(moved, [-1, int(np.prod(shape[1:], dtype=int)), state.shape[axis]])
    vector = vector[..., None] if len(vector.shape) == 2 else vector[None, :, None]
    vector = tf.broadcast_to(vector, [tf.shape(flat)[0], *vector.shape[1:]])
    return tf.reshape(matmul(flat, vector), shape)
