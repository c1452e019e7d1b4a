"""Read-outs of a state, against Strawberry Fields' own."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from strawberryfields.backends.tfbackend.states import FockStateTF

from workers.engine.state import TracedFockState


def mixed(modes: int, cutoff: int, batch: int | None, dtype: str) -> np.ndarray:
    """Density matrices, two axes a mode."""
    size, rng = cutoff**modes, np.random.default_rng(0)
    root = rng.normal(size=(batch or 1, size, 2 * size)).view(complex)
    rho = root @ root.conj().transpose(0, 2, 1)
    rho = rho.reshape(-1, *[cutoff] * (2 * modes))
    pairs = [axis for mode in range(1, modes + 1) for axis in (mode, mode + modes)]
    rho = rho.transpose(0, *pairs).astype(dtype)
    return rho if batch else rho[0]


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize(("modes", "cutoff"), [(1, 4), (2, 3), (3, 2)])
def test_probabilities_of_mixed_states(modes: int, cutoff: int, batch: int | None, dtype: str):
    data = tf.constant(mixed(modes, cutoff, batch, dtype))
    options = {"batched": batch is not None, "dtype": data.dtype}
    ours, stock = (
        kind(data, modes, False, cutoff, **options).all_fock_probs()
        for kind in (TracedFockState, FockStateTF)
    )
    assert ours.dtype == stock.dtype
    np.testing.assert_array_equal(ours, stock)


def test_they_are_compiled_vectorised_with_their_gradient() -> None:
    data = tf.constant(mixed(2, 3, 3, "complex64"))

    def read(rho: tf.Tensor) -> tf.Tensor:
        state = TracedFockState(rho, 2, False, 3, batched=False, dtype=rho.dtype)
        return tf.math.real(state.all_fock_probs()) ** 2

    @tf.function(jit_compile=True, autograph=False)
    def gradient(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = tf.vectorized_map(read, x)
        return tape.gradient(found, x)

    with tf.GradientTape() as tape:
        tape.watch(data)
        expected = FockStateTF(data, 2, False, 3, batched=True, dtype=data.dtype).all_fock_probs()
        expected = tf.math.real(expected) ** 2
    np.testing.assert_allclose(gradient(data), tape.gradient(expected, data), rtol=1e-5)
