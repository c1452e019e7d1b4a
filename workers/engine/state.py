"""Strawberry Fields' state, with read-outs that suit a graph.

Owns what of a ``FockStateTF`` is computed in another way; the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from strawberryfields.backends.tfbackend.states import FockStateTF

from workers.tensors import matmul


class TracedFockState(FockStateTF):
    """A ``FockStateTF`` that traces modes out of a ket without making its density matrix, whose
    expectation values are as precise in a graph as they are eagerly, and that loops over nothing.
    """

    def quad_expectation(self, mode: int, phi: Any = 0.0, **kwargs: Any) -> tuple[Any, Any]:
        """See ``FockStateTF.quad_expectation``: mean and variance of cos(phi) x + sin(phi) p.

        Strawberry Fields' ladder operators are made of Python's numbers, which a graph takes in
        single precision.
        """
        cutoff = self.cutoff_dim
        rho = tf.reshape(self.reduced_dm([mode]), [-1, cutoff, cutoff])
        levels = np.arange(cutoff + 1)  # one more, for the square to be right below the cutoff
        roots = np.sqrt(levels[1:])
        x = np.sqrt(self._hbar / 2.0) * (np.diag(roots, 1) + np.diag(roots, -1))
        phi = tf.reshape(tf.cast(tf.convert_to_tensor(phi), self.dtype), [])
        steps = tf.constant((levels - levels[:, None])[:cutoff, :cutoff], self.dtype)
        turn = tf.exp(1j * phi * steps)

        def mean(operator: np.ndarray) -> tf.Tensor:
            part = tf.constant(operator[:cutoff, :cutoff], self.dtype) * turn
            found = tf.math.real(tf.reduce_sum(rho * part, [1, 2]))
            return found if self.batched else found[0]

        first = mean(x)
        return first, mean(x @ x) - first**2

    def all_fock_probs(self, **kwargs: Any) -> tf.Tensor:
        """See ``FockStateTF.all_fock_probs``: ([batch,] D, ..., D), of a mixed state complex.

        Of those, Strawberry Fields takes one sample after another, in a loop.
        """
        if self.is_pure:
            return super().all_fock_probs(**kwargs)
        count, shape = self.num_modes, [self.cutoff_dim] * self.num_modes
        rho = self.data if self.batched else self.data[None]
        pairs = tf.transpose(rho, [0, *range(1, 2 * count + 1, 2), *range(2, 2 * count + 1, 2)])
        size = self.cutoff_dim**count
        found = tf.linalg.diag_part(tf.reshape(pairs, [-1, size, size]))
        return tf.reshape(found, [-1, *shape] if self.batched else shape)

    def reduced_dm(self, modes: Any, **kwargs: Any) -> tf.Tensor:
        """See ``FockStateTF.reduced_dm``: ([batch,] D, D, ...), two axes a mode."""
        kept = [modes] if isinstance(modes, int) else list(modes)
        plain = kept == sorted(set(kept)) and 0 < len(kept) < self.num_modes
        if not (self.is_pure and plain):
            return super().reduced_dm(modes, **kwargs)
        cutoff, count = self.cutoff_dim, len(kept)
        ket = self.data if self.batched else self.data[None]
        traced = [mode for mode in range(self.num_modes) if mode not in kept]
        axes = [0, *(mode + 1 for mode in kept), *(mode + 1 for mode in traced)]
        ket = tf.reshape(tf.transpose(ket, axes), [-1, cutoff**count, cutoff ** len(traced)])
        rho = tf.reshape(matmul(ket, ket, adjoint_b=True), [-1, *[cutoff] * (2 * count)])
        pairs = [axis for mode in range(1, count + 1) for axis in (mode, mode + count)]
        rho = tf.transpose(rho, [0, *pairs])
        return rho if self.batched else rho[0]
