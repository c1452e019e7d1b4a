"""Fock states in position and in phase space: wave functions, their integrals, Wigner functions.

Owns the formulas and their recurrences, in dimensionless units (hbar = 1: the vacuum's x has
variance 1/2). Whoever uses them scales by Strawberry Fields' hbar: q = sqrt(hbar) x.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from workers.engine import projections


def wave_functions(x: Any, cutoff: int) -> Any:
    """psi_n(x) of the Fock states n < cutoff: x of any shape (...) -> (..., cutoff), as x is."""
    return tf.stack(projections.wave_functions(x, tf.exp(-(x**2) / 2), cutoff), axis=-1)


def overlaps_below(x: Any, cutoff: int) -> Any:
    """Integrals of psi_m psi_n from -infinity to x: (...) -> (..., cutoff, cutoff).

    Off the diagonal (psi_m psi_n' - psi_n psi_m') / (2 (m - n)), which follows from
    psi_n'' = (x^2 - 2n - 1) psi_n. On it I_n = I_(n-1) - psi_n psi_(n-1) / sqrt(2n), from
    integrating psi_n = (x - d/dx) psi_(n-1) / sqrt(2n) by parts, with I_0 = (1 + erf x) / 2.
    """
    more = wave_functions(x, cutoff + 1)
    psi, n = more[..., :-1], np.arange(cutoff)
    down = tf.concat([tf.zeros_like(psi[..., :1]), psi[..., :-1]], axis=-1)
    roots = np.sqrt([n / 2, (n + 1) / 2]).astype(x.dtype.as_numpy_dtype)
    slopes = roots[0] * down - roots[1] * more[..., 1:]  # psi_n'
    wronskians = psi[..., :, None] * slopes[..., None, :] - psi[..., None, :] * slopes[..., :, None]
    apart = 2.0 * (n[:, None] - n)
    scale = np.divide(1, apart, out=np.zeros_like(apart), where=apart != 0)
    steps = psi * down * np.divide(1, 2 * roots[0], out=np.zeros_like(roots[0]), where=n > 0)
    diagonal = (1 + tf.math.erf(x))[..., None] / 2 - tf.cumsum(steps, axis=-1)
    return wronskians * scale.astype(psi.dtype.as_numpy_dtype) + tf.linalg.diag(diagonal)


def wigner_table(x: np.ndarray, p: np.ndarray, cutoff: int) -> np.ndarray:
    """Wigner functions of |m><n|: (cutoff, cutoff, len(x), len(p)), complex128.

    For n >= m, with r^2 = x^2 + p^2: exp(-r^2) / pi (-1)^m sqrt(2^(n-m) m! / n!)
    (x + i p)^(n-m) L_m^(n-m)(2 r^2) (Cahill & Glauber, Phys. Rev. 177, 1882, 1969), and its
    conjugate for |n><m|.
    """
    from scipy.special import eval_genlaguerre, gammaln

    plane = x[:, None] + 1j * p
    square = np.abs(plane) ** 2
    table = np.empty((cutoff, cutoff, *square.shape), complex)
    for m in range(cutoff):
        for n in range(m, cutoff):
            size = np.exp(0.5 * ((n - m) * math.log(2) + gammaln(m + 1) - gammaln(n + 1)) - square)
            value = (-1) ** m / math.pi * size * plane ** (n - m)
            table[m, n] = value * eval_genlaguerre(m, n - m, 2 * square)
            table[n, m] = table[m, n].conj()
    return table
