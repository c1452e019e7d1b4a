"""The geometry of a circuit's states, and steps along it: quantum Fisher information.

Owns the Jacobian of a ket with respect to weights and what is made of it. The optimizer that takes
the step is anyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from workers.engine import exported
from workers.errors import InputError
from workers.tensors import in_graph


class QuantumFisher:
    """The quantum Fisher information of kets with respect to weights, compiled once.

    F_ij = 4 Re(<d_i psi|d_j psi> - <d_i psi|psi><psi|d_j psi>) for a pure state of norm 1
    (Stokes et al., Quantum 4, 269, 2020); of a batch, the mean over its samples. A quarter of it
    is the Fubini-Study metric.

    Args:
        ket: (batch, ...) inputs -> kets, (batch, D, ..., D), complex: a layer with
            ``readout="ket"``, say. Compiled with XLA, so it must be traceable.
        variables: P scalars in all, real.
    """

    def __init__(self, ket: Callable[[Any], Any], variables: Sequence[Any]) -> None:
        self._ket = ket
        self.variables = [v if isinstance(v, tf.Variable) else v.value for v in variables]
        if not self.variables or any(not v.dtype.is_floating for v in self.variables):
            raise InputError("the quantum Fisher information needs real variables, one at least")
        self._sizes = [int(v.shape.num_elements()) for v in self.variables]
        self._compiled = tf.function(self.compute, jit_compile=True)

    def __call__(self, inputs: Any) -> Any:
        """The (P, P) matrix, real, for a batch of inputs; rows in the order of the variables."""
        return in_graph(self._compiled, tf.convert_to_tensor(inputs))

    def jacobian(self, inputs: Any) -> tuple[Any, Any]:
        """Kets, (batch, M), and their derivatives, (P, batch, M), M amplitudes each."""
        with tf.GradientTape(persistent=True) as outer:
            with exported.written_out(), tf.GradientTape() as inner:
                ket = self._ket(inputs)
                ket = tf.reshape(ket, [-1, ket.shape[1:].num_elements()])
                parts = tf.stack([tf.math.real(ket), tf.math.imag(ket)])
            # The vjp is linear in its cotangents, so that its own vjp is the jvp, whatever they
            # are: a gate needs no other derivative than the ones it has.
            cotangents = tf.zeros_like(parts)
            outer.watch(cotangents)
            pulled = inner.gradient(
                parts,
                self.variables,
                output_gradients=cotangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            flat = tf.concat([tf.reshape(g, [-1]) for g in pulled], axis=0)
        directions = tf.eye(sum(self._sizes), dtype=flat.dtype)
        pushed = tf.map_fn(
            lambda direction: outer.gradient(flat, cotangents, output_gradients=direction),
            directions,
        )
        return ket, tf.complex(pushed[:, 0], pushed[:, 1])

    def compute(self, inputs: Any) -> Any:
        """As a call, uncompiled, for a function that is compiled as a whole."""
        ket, derivatives = self.jacobian(inputs)
        norm = tf.reduce_sum(tf.math.conj(ket) * ket, axis=1)
        # <d_i psi|d_j psi> and <psi|d_i psi> of the kets scaled to norm 1, sample by sample.
        both = tf.einsum("ibm,jbm->bij", tf.math.conj(derivatives), derivatives)
        along = tf.einsum("bm,ibm->bi", tf.math.conj(ket), derivatives)
        norm = norm[:, None, None]
        metric = both / norm - tf.math.conj(along)[:, :, None] * along[:, None, :] / norm**2
        return 4 * tf.reduce_mean(tf.math.real(metric), axis=0)


def natural_gradient(fisher: Any, gradients: Sequence[Any], damping: float = 1e-3) -> list[Any]:
    """Gradients turned along the geometry of states: (F / 4 + damping 1)^-1 g, as ``gradients``.

    ``fisher`` is (P, P), of the same P scalars as the gradients, in their order; a quarter of it is
    the metric of the states (Stokes et al., Quantum 4, 269, 2020, eq. 3). ``damping`` bounds the
    step along directions that hardly change the state.
    """
    if not damping > 0:
        raise InputError(f"damping must be more than 0, not {damping}: the metric has a kernel")
    dense = [tf.convert_to_tensor(g) for g in gradients]
    flat = tf.concat([tf.reshape(g, [-1]) for g in dense], axis=0)
    fisher = tf.convert_to_tensor(fisher)
    if fisher.shape != (flat.shape[0],) * 2:
        raise InputError(
            f"the Fisher information is {tuple(fisher.shape)}; expected {(flat.shape[0],) * 2}, "
            "for as many scalars as the gradients have"
        )
    metric = fisher / 4 + damping * tf.eye(flat.shape[0], dtype=fisher.dtype)
    turned = tf.linalg.solve(metric, tf.cast(flat, fisher.dtype)[:, None])[:, 0]
    parts = tf.split(turned, [int(g.shape.num_elements()) for g in dense])
    return [tf.cast(tf.reshape(p, g.shape), g.dtype) for p, g in zip(parts, dense, strict=True)]
