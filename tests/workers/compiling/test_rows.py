"""A call that loops over its rows gives the same, vectorised over them."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers import sf_compat
from workers.compiling.rows import by_rows
from workers.engine import circuit
from workers.errors import UntraceableError

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

from workers.engine import TracedEngine  # noqa: E402

Z = tf.constant(np.random.default_rng(2).normal(0, 0.5, (5, 2)))
BIAS = tf.Variable(tf.zeros(5, tf.float64))
W = tf.Variable(np.random.default_rng(3).normal(0, 0.3, 4))


def state(x, y, cutoff=5, **options):
    program = sf.Program(2)
    names = program.params("x", "y", "a", "b", "c", "d")
    with program.context as q:
        ops.Dgate(names[0], names[1]) | q[0]
        ops.Sgate(names[2], names[3]) | q[1]
        ops.BSgate(names[4], 0.1) | (q[0], q[1])
        ops.Kgate(names[5]) | q[0]
    options = {"cutoff_dim": cutoff, "dtype": tf.complex128, **options}
    args = dict(zip("xyabcd", [x, y, *tf.unstack(W)], strict=True))
    return TracedEngine("tf", backend_options=options).run(program, args=args).state


READ = {
    "means": lambda s: tf.stack([s.mean_photon(0)[0], s.quad_expectation(1, 0.3)[0]]),
    "probabilities": lambda s: tf.reshape(s.all_fock_probs(), [-1]),
    "density": lambda s: tf.math.real(s.reduced_dm([1])),
    "ket": lambda s: s.ket(),
    "fidelity": lambda s: s.fidelity_coherent([0.1, 0.2]),
}


def looped(read, **options):
    return lambda z: tf.stack([read(state(row[0], row[1], **options)) for row in tf.unstack(z)])


def value_and_gradients(call, z):
    with tf.GradientTape() as tape:
        tape.watch(z)
        found = call(z)
        total = tf.reduce_sum(tf.abs(found) ** 2)
    return [found, *tape.gradient(total, [z, W])]


@pytest.mark.parametrize("read", READ)
def test_values_and_gradients_are_those_of_the_loop(read: str) -> None:
    call = looped(READ[read])
    expected = value_and_gradients(call, Z)
    vectorised = tf.function(lambda z: value_and_gradients(by_rows(call, (True,), {}), z))
    with circuit.tally() as tally:
        found = vectorised(Z)
    assert tally.runs == 1  # for all rows
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_it_is_one_graph_which_xla_compiles_once_for_all_values() -> None:
    """A function within has a backward pass that takes shapes from its forward pass; XLA then takes
    what those come from for constants, and compiles for each value anew."""
    call = looped(READ["means"])
    traced = tf.function(
        lambda z: value_and_gradients(by_rows(call, (True,), {}), z), jit_compile=True
    )
    traced(Z)
    graph = traced.get_concrete_function(Z).graph
    assert not graph.as_graph_def().library.function


@pytest.mark.parametrize("rows", [1, 2])
def test_mixed_states_cutoff_two_and_one_row(rows: int) -> None:
    call = looped(READ["density"], cutoff=2, pure=False)
    vectorised = tf.function(by_rows(call, (True,), {}))
    np.testing.assert_allclose(vectorised(Z[:rows]), call(Z[:rows]), atol=1e-10)


def test_circuits_that_follow_each_other_and_one_that_all_rows_share() -> None:
    def one(row):
        first = state(row[0], 0.1).mean_photon(0)[0]
        second = state(first, row[1]).mean_photon(1)[0]
        return second + state(0.3, 0.2).mean_photon(0)[0]

    def call(z, scale):
        return tf.stack([one(row) * scale[0] for row in tf.unstack(z)])

    scale = tf.constant([2.0], tf.float64)
    vectorised = tf.function(by_rows(call, (True, False), {}))
    np.testing.assert_allclose(vectorised(Z, scale), call(Z, scale), atol=1e-10)


def test_what_would_have_another_gradient_is_refused() -> None:
    @tf.custom_gradient
    def straight_through(x):
        return tf.round(x), lambda cotangent: cotangent

    def call(z):
        return tf.stack([straight_through(state(x, y).mean_photon(0)[0]) for x, y in z])

    from workers.engine import symbols

    def traced(z):
        with symbols.answered():
            return by_rows(call, (True,), {})(z)

    for rows in (1, len(Z)):  # a form that is chosen for one row is taken for more of them
        with pytest.raises(UntraceableError, match="custom_gradient"):
            tf.function(traced, autograph=False)(Z[:rows])


COUPLED = {
    "norm of the batch": lambda z: [one(row) for row in tf.unstack(tf.clip_by_norm(z, 1e3))],
    "row before": lambda z: [one(z[n]) + tf.nn.relu(z[n - 1, 0] - 1e3) for n in range(len(z))],
    "sum so far": lambda z: list(tf.unstack(tf.cumsum(tf.stack([one(r) for r in z])) * 1e-300)),
    "place in a variable": lambda z: [one(z[n]) + BIAS[n] for n in range(len(z))],
    "largest": lambda z: [one(row) * tf.sign(tf.reduce_max(z) + 1e3) for row in tf.unstack(z)],
}


def one(row):
    return state(row[0], row[1]).mean_photon(0)[0]


@pytest.mark.parametrize("coupled", COUPLED)
def test_rows_that_could_touch_each_other_are_refused_whatever_the_numbers_say(coupled) -> None:
    from workers.engine import symbols

    def call(z):
        with symbols.answered():
            return by_rows(lambda z: tf.stack(COUPLED[coupled](z)), (True,), {})(z)

    with pytest.raises(UntraceableError, match="may depend on other rows"):
        tf.function(call, autograph=False)(Z)


def test_rows_that_are_encoded_together_and_read_out_together_are_alone() -> None:
    dense = tf.constant(np.random.default_rng(5).normal(size=(2, 2)))

    def call(z):
        encoded = tf.tanh(tf.nn.bias_add(tf.matmul(z, dense), [0.1, 0.2])) / tf.norm(dense)
        encoded = encoded - tf.reduce_mean(encoded, axis=1, keepdims=True)
        read = tf.stack([one(encoded[n]) for n in range(encoded.shape[0])])
        return tf.concat([read[:, None], encoded], axis=1)

    vectorised = tf.function(by_rows(call, (True,), {}), autograph=False)
    np.testing.assert_allclose(vectorised(Z), call(Z), atol=1e-10)


def test_circuits_with_a_batch_of_their_own_are_refused() -> None:
    def call(z):
        grid = tf.constant([0.1, 0.2, 0.3], tf.float64)
        return tf.stack([state(row[0] * grid, 0.1).mean_photon(0)[0] for row in tf.unstack(z)])

    with pytest.raises(UntraceableError, match="batch of their own"):
        tf.function(by_rows(call, (True,), {}), autograph=False)(Z)
