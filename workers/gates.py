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

import numpy as np
import tensorflow as tf
from scipy.special import gammaln

#: What gates are computed in; a single-precision state gets them rounded.
FLOAT = tf.float64

#: From a cotangent to the cotangent of the argument.
Pullback = Callable[[tf.Tensor], tf.Tensor]

Complex = tuple[tf.Tensor, tf.Tensor | None]
"""Real and imaginary part; None stands for an imaginary part that is 0 everywhere."""


# -- one mode ---------------------------------------------------------------------------------


def displacement(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(r (a^dagger - a)) for real r: (...) -> (..., cutoff, cutoff)."""
    root, _ = _roots(cutoff)

    @tf.custom_gradient
    def core(r: tf.Tensor) -> tuple[tf.Tensor, Pullback]:
        matrix = displacement_by_columns(r, cutoff)

        def pull_back(cotangent: tf.Tensor) -> tf.Tensor:
            derivative = (
                root[:, None] * _shift(matrix, 1, axis=-2)
                - root * _shift(matrix, 1)
                - r[..., None, None] * matrix
            )
            return tf.reduce_sum(cotangent * derivative, [-2, -1])

        return matrix, pull_back

    return core(r)


def displacement_by_columns(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The same, for automatic differentiation, which is slower."""
    root, inverse_root = _roots(cutoff)
    column = displaced_vacuum(r, cutoff)
    columns = [column]
    for n in range(1, cutoff):
        raised = root * _shift(column, 1)
        column = (raised - r[..., None] * column) * inverse_root[n]
        columns.append(column)
    return tf.stack(columns, -1)


def displaced_vacuum(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The first column of the displacement, exp(-r^2/2) r^n / sqrt(n!): (...) -> (..., cutoff)."""
    _, inverse_root = _roots(cutoff)
    terms = [tf.exp(-0.5 * r * r)]
    for n in range(1, cutoff):
        terms.append(terms[-1] * r * inverse_root[n])
    return tf.stack(terms, -1)


def squeezing(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """exp(r (a^2 - a^dagger^2) / 2) for real r: (...) -> (..., cutoff, cutoff)."""
    root, inverse_root = _roots(cutoff)
    root2 = np.sqrt(np.arange(cutoff) * np.maximum(np.arange(cutoff) - 1, 0))

    @tf.custom_gradient
    def core(r: tf.Tensor) -> tuple[tf.Tensor, Pullback]:
        tanh, sech = tf.tanh(r)[..., None], (1 / tf.cosh(r))[..., None]
        column, before = squeezed_vacuum(r, cutoff), tf.zeros_like(r)[..., None]
        columns = [column]
        for n in range(1, cutoff):
            raised = sech * root * _shift(column, 1)
            column, before = (raised + tanh * root[n - 1] * before) * inverse_root[n], column
            columns.append(column)
        matrix = tf.stack(columns, -1)

        def pull_back(cotangent: tf.Tensor) -> tf.Tensor:
            t, s = tanh[..., None], sech[..., None]
            derivative = (
                -0.5 * t * matrix
                - s * t * np.outer(root, root) * _shift(_shift(matrix, 1, axis=-2), 1)
                - 0.5 * s * s * root2[:, None] * _shift(matrix, 2, axis=-2)
                + 0.5 * s * s * root2 * _shift(matrix, 2)
            )
            return tf.reduce_sum(cotangent * derivative, [-2, -1])

        return matrix, pull_back

    return core(r)


def squeezed_vacuum(r: tf.Tensor, cutoff: int) -> tf.Tensor:
    """The first column of the squeezing: (...) -> (..., cutoff)."""
    _, inverse_root = _roots(cutoff)
    tanh, zero = tf.tanh(r), tf.zeros_like(r)
    terms = [tf.sqrt(1 / tf.cosh(r))]
    for n in range(1, cutoff):
        terms.append(zero if n % 2 else terms[-2] * -tanh * (inverse_root[n] / inverse_root[n - 1]))
    return tf.stack(terms, -1)


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
    # columns[q][p, n] is the amplitude of |n + p - q, n> in the image of |p, q>.
    column = binomial * _powers(tanh, cutoff) * _powers(sech, cutoff, axis=-2) * sech
    columns = [column]
    for q in range(1, cutoff):
        column = inverse_root[q] * (
            sech * root * _shift(column, 1) - tanh * root[:, None] * _shift(column, 1, axis=-2)
        )
        columns.append(column)
    block, m, p_in = np.ogrid[:cutoff, :cutoff, :cutoff]
    n_out, q_in = (m - block) % cutoff, (p_in - block) % cutoff
    flat = tf.reshape(tf.stack(columns, -3), [*_leading(column, 2), cutoff**3])
    same = m - n_out == p_in - q_in
    return tf.gather(flat, (q_in * cutoff + p_in) * cutoff + n_out, axis=-1) * same


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


def _shift(x: tf.Tensor, by: int, axis: int = -1) -> tf.Tensor:
    """Move entries up along an axis: entry n comes from n - by, the first ones are 0."""
    size = x.shape[axis]
    by = min(by, size)
    front = [slice(None)] * len(x.shape)
    front[axis] = slice(0, size - by)
    paddings = [[0, 0]] * len(x.shape)
    paddings[axis] = [by, 0]
    return tf.pad(x[tuple(front)], paddings)


def _powers(x: tf.Tensor, count: int, axis: int = -1) -> tf.Tensor:
    """1, x, x^2, ... along an axis of x that has length 1."""
    terms = [tf.ones_like(x)]
    for _ in range(count - 1):
        terms.append(terms[-1] * x)
    return tf.concat(terms, axis)


def _leading(x: tf.Tensor, trailing: int) -> list:
    """The shape of x without its last axes, static where it is known."""
    rank = len(x.shape) - trailing
    if x.shape[:rank].is_fully_defined():
        return x.shape[:rank].as_list()
    return [tf.shape(x)[n] if x.shape[n] is None else x.shape[n] for n in range(rank)]
