"""Fock matrices of the gates, many at once, in real numbers.

Owns the numbers of each gate: how its matrix follows from its parameters, and the derivative where
automatic differentiation would be slow. Knows nothing of circuits, states or batches: parameters
have any leading shape (...), matrices come out as (..., rows, columns) in float64.

A gate is written as phases around a core: G[m, n] = exp(i a(m)) core[m, n] exp(i b(n)). The
phases are linear in phi, and the core depends on one real parameter only; it is real for all gates
but the cubic phase and the Mach-Zehnder interferometer.

Two-mode cores keep n0 + n1 or n0 - n1, so all but one entry in D of the D x D x D x D tensor are
zero. What is left is packed without padding: block k holds the pairs with (n0 + n1) mod D = k (or
(n0 - n1) mod D = k), one for each n0. Such a core has shape (..., D, D, D): block, row n0, column
n0. Entries between two pairs of a block that differ in n0 + n1 itself (by D) are zero.

The matrices are those of the infinite-dimensional gates, cut at the cutoff, as in Strawberry
Fields (the cubic phase apart, which is the exponential of the truncated x^3, there as here).

Sources: displacement and squeezing by the recurrences of Miatto and Quesada, Quantum 4, 366 (2020),
with their closed-form derivatives; the beamsplitter from the spectrum of its generator, which is
2 J_y of angular momentum theory (Schwinger's representation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.special import gammaln

from workers import names
from workers.custom_gradient import custom_gradient
from workers.tensors import in_loops

#: What gates are computed in; a single-precision state gets them rounded.
FLOAT = tf.float64

#: Columns up to which a recurrence is written out: a loop of so few is no smaller, and slower.
_UNROLLED = 4

#: From a cotangent to the cotangent of the argument.
Pullback = Callable[[tf.Tensor], tf.Tensor]

#: From a column's number and the two columns before it to that column.
_Next = Callable[[Any, tf.Tensor, tf.Tensor], tf.Tensor]

Complex = tuple[tf.Tensor, tf.Tensor | None]
"""Real and imaginary part; None stands for an imaginary part that is 0 everywhere."""


# -- one mode ---------------------------------------------------------------------------------


def displacement(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(r (a^dagger - a)) for real r: (...) -> (..., cutoff, cutoff)."""
    root, _ = _roots(cutoff)

    def derivative(r: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
        return (
            root[:, None] * _shift(matrix, 1, axis=-2)
            - root * _shift(matrix, 1)
            - r[..., None, None] * matrix
        )

    made = _columns(*_displaced(tf.stop_gradient(r), cutoff), cutoff)
    return _with_derivative(r, made, derivative)


def displacement_by_columns(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The same, for automatic differentiation, which is slower."""
    return _columns(*_displaced(r, cutoff), cutoff, loop=False)


def _displaced(r: tf.Tensor, cutoff: int) -> tuple[tf.Tensor, _Next]:
    """The first column of the displacement, and what makes the next one."""
    root, inverse_root = _roots(cutoff)
    roots, amplitude = tf.constant(root, FLOAT), r[..., None]

    def following(n: int | tf.Tensor, column: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        # The first root is 0: what comes round is not taken.
        return (roots * _rolled(column) - amplitude * column) * _entry(inverse_root, n)

    return displaced_vacuum(r, cutoff), following


def displaced_vacuum(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The first column of the displacement, exp(-r^2/2) r^n / sqrt(n!): (...) -> (..., cutoff)."""
    n = np.arange(cutoff)
    weight = np.exp(-0.5 * gammaln(n + 1))
    return tf.exp(-0.5 * r * r)[..., None] * _powers(r[..., None], n) * weight


def squeezing(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(r (a^2 - a^dagger^2) / 2) for real r: (...) -> (..., cutoff, cutoff)."""
    root, inverse_root = _roots(cutoff)
    root2 = np.sqrt(np.arange(cutoff) * np.maximum(np.arange(cutoff) - 1, 0))

    def derivative(r: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
        t, s = (x[..., None, None] for x in (tf.tanh(r), 1 / tf.cosh(r)))
        return (
            -0.5 * t * matrix
            - s * t * np.outer(root, root) * _shift(_shift(matrix, 1, axis=-2), 1)
            - 0.5 * s * s * root2[:, None] * _shift(matrix, 2, axis=-2)
            + 0.5 * s * s * root2 * _shift(matrix, 2)
        )

    fixed = tf.stop_gradient(r)
    tanh, raising = tf.tanh(fixed)[..., None], (1 / tf.cosh(fixed))[..., None] * root

    def following(n: int | tf.Tensor, column: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        # The first root is 0: what comes round is not taken.
        lowered = tanh * before * _entry(root, n - 1)
        return (raising * _rolled(column) + lowered) * _entry(inverse_root, n)

    made = _columns(squeezed_vacuum(fixed, cutoff), following, cutoff)
    return _with_derivative(r, made, derivative)


def squeezed_vacuum(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The first column of the squeezing, sqrt(sech r (2 k)!) (-tanh r)^k / (2^k k!) for n = 2 k:
    (...) -> (..., cutoff)."""
    n = np.arange(cutoff)
    k: np.ndarray = n // 2
    weight = np.exp(0.5 * gammaln(n + 1) - gammaln(k + 1) - k * np.log(2.0)) * (n % 2 == 0)
    return tf.sqrt(1 / tf.cosh(r))[..., None] * _powers(-tf.tanh(r)[..., None], k) * weight


def displaced_squeezed_vacuum(
    r_d: tf.Tensor, phi_d: tf.Tensor, r_s: tf.Tensor, phi_s: tf.Tensor, cutoff: int
) -> tf.Tensor:
    """D(r_d exp(i phi_d)) S(r_s exp(i phi_s)) |0>, complex128: (...) -> (..., cutoff).

    The amplitudes obey sqrt(n + 1) c[n + 1] = (alpha + alpha* t) c[n] - t sqrt(n) c[n - 1] with
    t = exp(i phi_s) tanh(r_s), since the state is annihilated by S D a D^dagger S^dagger.
    """
    root, inverse_root = _roots(cutoff)
    alpha = _polar(r_d, phi_d)
    t = _polar(tf.tanh(r_s), phi_s)
    conjugate = tf.math.conj(alpha)
    drift = alpha + conjugate * t
    size = tf.complex(tf.sqrt(1 / tf.cosh(r_s)), tf.zeros_like(r_s))
    terms = [size * tf.exp(-0.5 * conjugate * drift)]
    for n in range(1, cutoff):
        term = drift * terms[-1]
        if n > 1:
            term -= t * root[n - 1] * terms[-2]
        terms.append(term * inverse_root[n])
    return tf.stack(terms, -1)


def _polar(r: tf.Tensor, phi: tf.Tensor) -> tf.Tensor:
    return tf.complex(r * tf.cos(phi), r * tf.sin(phi))


def cubic_phase(gamma: tf.Tensor, cutoff: int) -> Complex:
    """exp(i gamma x^3 / (3 hbar)) with hbar = 2, x truncated: (...) -> (..., cutoff, cutoff)."""
    return _cubic_spectrum(cutoff).at(gamma)


@functools.lru_cache
def _cubic_spectrum(cutoff: int) -> _Spectrum:
    root = np.sqrt(np.arange(1, cutoff))
    x = np.diag(root, 1) + np.diag(root, -1)
    values, vectors = np.linalg.eigh(x @ x @ x)
    projectors = np.einsum("if,jf->fij", vectors, vectors)
    return _Spectrum.of(values / 6, projectors)


# -- two modes --------------------------------------------------------------------------------


def beamsplitter(theta: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(theta (a b^dagger - a^dagger b)), blocks of n0 + n1: (...) -> (..., D, D, D)."""
    return _beamsplitter_spectrum(cutoff).at(theta)[0]


@functools.lru_cache
def _beamsplitter_spectrum(cutoff: int) -> _Spectrum:
    frequencies = np.arange(2 * cutoff - 1)
    cosines, sines = (np.zeros((2 * cutoff - 1, cutoff, cutoff, cutoff)) for _ in range(2))
    for total in range(2 * cutoff - 1):
        values, vectors = _photon_transfer(total)
        low, high = max(0, total - cutoff + 1), min(total, cutoff - 1) + 1
        block = (total % cutoff, slice(low, high), slice(low, high))
        for value, vector in zip(np.rint(values).astype(int), vectors.T, strict=True):
            projector = np.outer(vector, vector.conj())[low:high, low:high]
            # exp(-i f theta) P, added up over +f and -f, is real.
            cosines[abs(value)][block] += projector.real
            sines[abs(value)][block] += np.sign(value) * projector.imag
    return _Spectrum.of(frequencies, cosines, sines, real=True)


def _photon_transfer(total: int) -> tuple[np.ndarray, np.ndarray]:
    """Spectrum of i (a b^dagger - a^dagger b) on the states |n0, total - n0>."""
    n = np.arange(1, total + 1)
    hop = np.sqrt(n * (total - n + 1.0))
    return np.linalg.eigh(1j * (np.diag(hop, 1) - np.diag(hop, -1)))


def mach_zehnder(phi_in: tf.Tensor, cutoff: int) -> Complex:
    """B exp(i phi_in n0) B with B = BS(pi/4, pi/2), blocks of n0 + n1: (...) -> (..., D, D, D)."""
    return _mach_zehnder_spectrum(cutoff).at(phi_in)


@functools.lru_cache
def _mach_zehnder_spectrum(cutoff: int) -> _Spectrum:
    shape = (2 * cutoff - 1, cutoff, cutoff, cutoff)
    table: np.ndarray = np.zeros(shape, complex)
    for total in range(2 * cutoff - 1):
        values, vectors = _photon_transfer(total)
        phase = np.exp(0.5j * np.pi * np.arange(total + 1))
        half = (vectors * np.exp(-0.25j * np.pi * values)) @ vectors.conj().T
        half = phase.conj()[:, None] * half * phase
        low, high = max(0, total - cutoff + 1), min(total, cutoff - 1) + 1
        block = (slice(0, total + 1), total % cutoff, slice(low, high), slice(low, high))
        table[block] = np.einsum("if,fj->fij", half[low:high], half[:, low:high])
    return _Spectrum.of(np.arange(2 * cutoff - 1), table)


def two_mode_squeezing(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(r (a^dagger b^dagger - a b)), blocks of n0 - n1: (...) -> (..., D, D, D)."""
    root, inverse_root = _roots(cutoff)
    tanh, sech = tf.tanh(r)[..., None, None], (1 / tf.cosh(r))[..., None, None]
    n, p = np.arange(cutoff), np.arange(cutoff)[:, None]
    binomial = np.exp(0.5 * (gammaln(n + p + 1) - gammaln(n + 1) - gammaln(p + 1)))
    # columns[p, n, q] is the amplitude of |n + p - q, n> in the image of |p, q>.
    first = binomial * _powers(tanh, n) * _powers(sech, p) * sech
    inverse_roots = tf.constant(inverse_root, FLOAT)

    def following(q: int | tf.Tensor, column: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        return inverse_roots[q] * (
            sech * root * _shift(column, 1) - tanh * root[:, None] * _shift(column, 1, axis=-2)
        )

    columns = _columns(first, following, cutoff, loop=False)
    block, m, p_in = np.ogrid[:cutoff, :cutoff, :cutoff]
    n_out, q_in = (m - block) % cutoff, (p_in - block) % cutoff
    flat = tf.reshape(columns, [*_leading(first, 2), cutoff**3])
    same = m - n_out == p_in - q_in
    return tf.gather(flat, (p_in * cutoff + n_out) * cutoff + q_in, axis=-1) * same


def loss(transmissivity: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The loss channel on (ket, bra) indices, blocks of ket - bra: (...) -> (..., D, D, D).

    |b><c| goes to the sum over lost photons l of sqrt(C(b, l) C(c, l)) (1 - T)^l
    T^((b + c) / 2 - l) |b - l><c - l|.
    """
    t = transmissivity[..., None, None, None]
    block, a, b = np.ogrid[:cutoff, :cutoff, :cutoff]
    c, d = (b - block) % cutoff, (a - block) % cutoff
    lost = np.where((b - a == c - d) & (b >= a), b - a, 0)
    possible = (b - a == c - d) & (b >= a)
    choose = [gammaln(x + 1) - gammaln(x - lost + 1) - gammaln(lost + 1) for x in (b, c)]
    weight = np.where(possible, np.exp(0.5 * sum(np.where(possible, x, 0) for x in choose)), 0)
    exponent = np.where(possible, (b + c) / 2 - lost, 0)
    kept = tf.pow(tf.where(exponent > 0, t, 1), np.where(exponent > 0, exponent, 1))
    gone = tf.pow(tf.where(lost > 0, 1 - t, 1), np.where(lost > 0, lost, 1).astype(float))
    return weight * kept * gone


# -- within -----------------------------------------------------------------------------------


def tables(kind: str, cutoff: int) -> tuple[tf.Tensor, ...]:
    """Tensors outside of any graph that the core of that kind of gate is made with."""
    spectra = {
        "cubic_phase": _cubic_spectrum,
        "beamsplitter": _beamsplitter_spectrum,
        "mach_zehnder": _mach_zehnder_spectrum,
    }
    if kind not in spectra:
        return ()
    spectrum = spectra[kind](cutoff)
    parts = (spectrum.real, spectrum.imaginary)
    return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A matrix that is a sum of constant matrices times cos(f x) and sin(f x)."""

    frequencies: np.ndarray
    shape: tuple[int, ...]
    real: tf.Tensor
    imaginary: tf.Tensor | None

    @staticmethod
    def of(
        frequencies: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray | None = None,
        *,
        real: bool = False,
    ) -> _Spectrum:
        """From tables (F, ...). Without ``sines``: the sum of ``cosines[f] exp(i f x)``."""
        if sines is None:
            sines = 1j * cosines
        table = np.concatenate([cosines, sines]).reshape(2 * len(frequencies), -1)
        with tf.init_scope():  # outside any graph: a table is an input of the graphs, not a part
            return _Spectrum(
                np.asarray(frequencies, float),
                cosines.shape[1:],
                tf.constant(table.real, FLOAT),
                None if real else tf.constant(table.imag, FLOAT),
            )

    def at(self, x: tf.Tensor) -> Complex:
        angles = x[..., None] * self.frequencies
        waves = tf.concat([tf.cos(angles), tf.sin(angles)], -1)

        def sum_up(table: tf.Tensor) -> tf.Tensor:
            flat = tf.matmul(tf.reshape(waves, [-1, table.shape[0]]), table)
            return tf.reshape(flat, [*_leading(waves, 1), *self.shape])

        return sum_up(self.real), None if self.imaginary is None else sum_up(self.imaginary)


def _roots(cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(np.arange(cutoff, dtype=float))
    return root, 1 / np.where(root == 0, 1, root)


def _entry(table: np.ndarray, n: int | tf.Tensor) -> Any:
    """A number of a table; ``n`` is a tensor in a loop."""
    return table[n] if isinstance(n, int) else tf.constant(table, FLOAT)[n]


def _rolled(x: tf.Tensor) -> tf.Tensor:
    """Entries moved up by one along the last axis, the last one to the front. Its axis is counted
    from the front: TensorFlow vectorises a roll of axis -1 to one of axis 0."""
    return tf.roll(x, 1, len(x.shape) - 1)


def _shift(x: tf.Tensor, by: int, axis: int = -1) -> tf.Tensor:
    """Move entries up along an axis: entry n comes from n - by, the first ones are 0."""
    size = x.shape[axis]
    by = min(by, size)
    front = [slice(None)] * len(x.shape)
    front[axis] = slice(0, size - by)
    paddings = [[0, 0]] * len(x.shape)
    paddings[axis] = [by, 0]
    return tf.pad(x[tuple(front)], paddings)


def _with_derivative(
    r: tf.Tensor, made: tf.Tensor, derivative: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """``made``, a matrix of r without a gradient, with the one that follows from itself and r: and
    so with all higher ones."""

    @custom_gradient
    def matrix(r: tf.Tensor, made: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        def pull_back(cotangent: tf.Tensor) -> tuple[tf.Tensor, None]:
            slope = derivative(r, _with_derivative(r, made, derivative))
            return tf.reduce_sum(cotangent * slope, [-2, -1]), None

        return tf.identity(made), pull_back

    # In a backward pass they are another graph's, which a further one has no access to.
    found: tf.Tensor = matrix(tf.identity(r), tf.stop_gradient(made))
    return found


def _powers(x: tf.Tensor, exponents: np.ndarray) -> tf.Tensor:
    """x to whole numbers, along an axis of x that has length 1. By squares: a few products of
    which any derivative exists at 0."""
    found = tf.ones_like(x)
    for bit in range(int(exponents.max()).bit_length()):
        found *= tf.where(exponents >> bit & 1 == 1, x, 1)
        x *= x
    return found * tf.ones(exponents.shape, x.dtype)


def _columns(first: tf.Tensor, following: _Next, cutoff: int, *, loop: bool = True) -> tf.Tensor:
    """Columns that follow from the two before: (..., D) -> (..., D, columns).

    Within XLA by a loop, if that may be, which is compiled once for all columns.
    """
    before = tf.zeros_like(first)
    if not (loop and cutoff > _UNROLLED and in_loops() and first.shape.is_fully_defined()):
        columns = [first]
        for n in range(1, cutoff):
            columns.append(following(n, columns[-1], columns[-2] if n > 1 else before))
        return tf.stack(columns, -1)

    def turn(n: tf.Tensor, column: tf.Tensor, before: tf.Tensor, made: tf.TensorArray) -> tuple:
        following_one = following(n, column, before)
        return n + 1, following_one, column, made.write(n, following_one)

    made = tf.TensorArray(first.dtype, cutoff, element_shape=first.shape).write(0, first)
    names.rounded()
    *_, made = tf.while_loop(
        lambda n, *_: n < cutoff,
        turn,
        [tf.constant(1), first, before, made],
        maximum_iterations=cutoff - 1,
    )
    rank = len(first.shape)
    return tf.transpose(made.stack(), [*range(1, rank + 1), 0])


def _leading(x: tf.Tensor, trailing: int) -> list:
    """The shape of x without its last axes, static where it is known."""
    rank = len(x.shape) - trailing
    if x.shape[:rank].is_fully_defined():
        return x.shape[:rank].as_list()
    return [tf.shape(x)[n] if x.shape[n] is None else x.shape[n] for n in range(rank)]
