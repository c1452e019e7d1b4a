"""Post-selection: the state that is left of the others when some modes were measured and found so.

Owns the vectors that outcomes are projections onto, and the projection with its norm. All of it is
TensorFlow's, so that what is heralded can be trained through, the norm included. Knows nothing of
programs; amplitudes are ([batch,] D, ...), a density matrix has two axes a mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from scipy.special import gammaln

from workers.engine import gates


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
        pairs = tf.transpose(state, [0, *range(1, rank + 1, 2), *range(2, rank + 1, 2)])
        size = cutoff ** (rank // 2)
        norm = tf.math.real(tf.linalg.trace(tf.reshape(pairs, [-1, size, size])))
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
    return tf.reshape(tf.matmul(flat, vector), shape)
