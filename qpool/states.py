"""The field's measures of a state: norm, purity, fidelity, photon numbers, Wigner function.

Functions of Strawberry Fields' TensorFlow states (``FockStateTF``), batched or not, differentiable
and traceable. A result has the state's batch axis if it has one. Owns the formulas.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qpool import phase_space
from workers.errors import InputError
from workers.tensors import squared_modulus

log = logging.getLogger("qpool")

#: Weight inside the cutoff below which a state is no longer what the gates say.
_ENOUGH = 0.99


def ket_norm(state: Any) -> Any:
    """The weight inside the cutoff: <psi|psi>, or the trace of a mixed state. (batch,), real.

    Gates are cut at the cutoff, so the weight that they move above it is lost: 1 - norm is how
    wrong the state is.
    """
    batched, data = _batched(state)
    if state.is_pure:
        norm = tf.reduce_sum(squared_modulus(data), axis=tuple(range(1, data.shape.rank)))
    else:
        norm = tf.math.real(_trace(data))
    return norm if batched else norm[0]


def warn_of_leakage(norm: Any, enough: float = _ENOUGH) -> bool:
    """Say in the log (``qpool``) that states leave the cutoff, if any of ``norm`` is below
    ``enough``; whether it was said. ``norm`` is what ``ket_norm`` gives, with numbers."""
    values = np.atleast_1d(np.asarray(norm))
    low = values < enough
    if low.any():
        log.warning(
            "%d of %d states have less than %.3g of their weight inside the cutoff (least: %.3g): "
            "raise cutoff_dim, or keep displacement and squeezing smaller",
            low.sum(),
            values.size,
            enough,
            values.min(),
        )
    return bool(low.any())


def purity(state: Any, modes: int | Sequence[int] | None = None) -> Any:
    """tr(rho^2) of the normalised state, of ``modes`` alone if given. (batch,), real.

    1 for a pure state; of one mode of an entangled one less, which measures the entanglement.
    """
    batched, _ = _batched(state)
    if modes is None and state.is_pure:
        return tf.ones_like(ket_norm(state))
    rho = _matrix(_reduced(state, modes))
    value = (
        tf.reduce_sum(squared_modulus(rho), axis=(1, 2)) / tf.math.real(tf.linalg.trace(rho)) ** 2
    )
    return value if batched else value[0]


def fidelity(state: Any, target: Any) -> Any:
    """How close a state is to a pure one: <target|rho|target>, as they are cut. (batch,), real.

    ``target`` is a pure state, batched as ``state`` or not, or a ket: (D, ..., D) or
    (batch, D, ..., D).
    """
    modes, cutoff = state.num_modes, state.cutoff_dim
    if hasattr(target, "is_pure"):
        if not target.is_pure:
            raise InputError("fidelity needs a pure target; this one is mixed")
        target = target.data
    target = tf.cast(tf.convert_to_tensor(target), state.data.dtype)
    if target.shape.rank not in (modes, modes + 1) or target.shape[-modes:] != (cutoff,) * modes:
        raise InputError(
            f"expected a target of shape {(cutoff,) * modes}, with or without a batch axis; came "
            f"{tuple(target.shape)}"
        )
    flat = tf.reshape(target, [-1, cutoff**modes])
    both = state.batched or target.shape.rank == modes + 1
    if state.is_pure:
        ket = tf.reshape(state.data, [-1, cutoff**modes])
        value = squared_modulus(tf.reduce_sum(tf.math.conj(flat) * ket, axis=1))
    else:
        rho = _matrix(_batched(state)[1])
        seen = tf.squeeze(tf.matmul(rho, flat[..., tf.newaxis]), axis=2)
        value = tf.math.real(tf.reduce_sum(tf.math.conj(flat) * seen, axis=1))
    return value if both else value[0]


def photon_distribution(state: Any, modes: int | Sequence[int] | None = None) -> Any:
    """Probabilities of photon numbers below the cutoff: ([batch,] D, ...), an axis a mode.

    Of ``modes`` alone if given, in ascending order. They add up to ``ket_norm``.
    """
    batched, data = _batched(state)
    if modes is None and state.is_pure:
        found = squared_modulus(data)
    else:
        rho = _reduced(state, modes)
        count = (rho.shape.rank - 1) // 2
        found = rho
        for _ in range(count):  # each mode's two axes to the back, as one
            found = tf.linalg.diag_part(tf.transpose(found, _front_pair_last(found.shape.rank)))
        found = tf.math.real(found)
    return found if batched else found[0]


def wigner(state: Any, mode: int, x: Any, p: Any) -> Any:
    """The Wigner function of one mode, the others traced out: ([batch,] len(x), len(p)), real.

    ``x`` and ``p`` are positions and momenta in Strawberry Fields' units. It integrates to
    ``ket_norm``. See ``qpool.phase_space.wigner_table``.
    """
    import strawberryfields as sf

    scale = math.sqrt(sf.hbar)
    batched, _ = _batched(state)
    rho = _reduced(state, mode)
    x, p = (np.asarray(axis, float) / scale for axis in (x, p))
    table = phase_space.wigner_table(x, p, state.cutoff_dim) / sf.hbar
    found = tf.math.real(tf.einsum("bnm,nmxp->bxp", rho, tf.constant(table, rho.dtype)))
    return found if batched else found[0]


def _batched(state: Any) -> tuple[bool, Any]:
    """Whether there is a batch axis, and the array with one."""
    return state.batched, state.data if state.batched else state.data[tf.newaxis]


def _reduced(state: Any, modes: int | Sequence[int] | None) -> Any:
    """The density matrix of some modes, or all: (batch, D, D, ...), two axes a mode."""
    if modes is None:
        rho = state.dm()
    else:
        given: Any = [modes] if np.ndim(modes) == 0 else modes
        kept = sorted({operator.index(mode) for mode in given})
        if any(mode not in range(state.num_modes) for mode in kept):
            raise InputError(f"modes {kept}: the state has modes 0 to {state.num_modes - 1}")
        rho = state.dm() if len(kept) == state.num_modes else state.reduced_dm(kept)
    return rho if state.batched else rho[tf.newaxis]


def _matrix(rho: Any) -> Any:
    """(batch, D, D, ...), two axes a mode -> (batch, D^N, D^N)."""
    count = (rho.shape.rank - 1) // 2
    size = int(rho.shape[-1]) ** count
    order = [0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2)]
    return tf.reshape(tf.transpose(rho, order), [-1, size, size])


def _trace(rho: Any) -> Any:
    return tf.linalg.trace(_matrix(rho))


def _front_pair_last(rank: int) -> list[int]:
    """Axes 1 and 2 moved to the end."""
    return [0, *range(3, rank), 1, 2]
