"""Circuits of a call that do not wait for each other give the same, run as one."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers import sf_compat
from workers.compiling.together import together
from workers.engine import circuit
from workers.errors import UntraceableError

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

from workers.engine import TracedEngine  # noqa: E402

DATA = np.random.default_rng(2).normal(0, 0.5, 5)
Z = tf.constant(np.random.default_rng(3).normal(0, 0.5, (4, 2)))
W = tf.Variable(np.random.default_rng(4).normal(0, 0.3, 5))


def state(x, *, cutoff=4, prepared=None, extra=False, **options):
    program = sf.Program(2)
    names = program.params("x", "a", "b", "c", "d", "e")
    with program.context as q:
        if prepared is not None:
            ops.Ket(prepared) | q
        ops.Dgate(names[0], 0.2) | q[0]
        ops.Sgate(names[1], names[2]) | q[1]
        ops.BSgate(names[3], 0.1) | (q[0], q[1])
        ops.Kgate(names[4]) | q[0]
        if extra:
            ops.Rgate(names[5]) | q[1]
    options = {"cutoff_dim": cutoff, "dtype": tf.complex128, **options}
    args = dict(zip("xabcde", [x, *tf.unstack(W)], strict=True))
    return TracedEngine("tf", backend_options=options).run(program, args=args).state


def mean(found):
    return found.quad_expectation(0, 0.3)[0]


def over_data(z):
    """A cost: one circuit for each of the data, whatever z."""
    loss = tf.constant(0.0, tf.float64)
    for x in DATA:
        loss += (mean(state(tf.constant(x))) - 0.3) ** 2
    return loss + tf.reduce_sum(z) * 0.0


def with_the_mean(z):
    """Rows that share what is made of all of them."""
    shared = tf.reduce_mean(z[:, 1])
    return tf.stack([mean(state(z[n, 0] + shared)) for n in range(len(z))])


def two_kinds(z):
    return tf.stack([mean(state(x, extra=n % 2 == 1)) for n, x in enumerate(tf.unstack(z[:, 0]))])


def the_same(z):
    """One circuit, run again and again: for its parameters, that are read anew, are the same."""
    found = [state(z[0, 0]), state(z[0, 0])]
    return tf.stack([mean(found[0]), tf.math.real(found[1].fidelity_vacuum())])


def fed_forward(z):
    """What the first circuits give, those after them take."""
    found = [mean(state(x)) for x in tf.unstack(z[:, 0])]
    return tf.stack([mean(state(x + 0.1 * n)) for n, x in enumerate(found)])


def of_one(z):
    """One comes before all others, which take its state."""
    ket = state(z[0, 1]).ket()
    return tf.stack([mean(state(x, prepared=ket)) for x in tf.unstack(z[:, 0])])


def of_each(z):
    """Each takes a state of its own."""
    kets = [tf.one_hot([n], 16, dtype=tf.complex128)[0] for n in range(4)]
    kets = [
        tf.reshape(ket * tf.cast(tf.exp(z[0, 0]) / tf.exp(z[0, 0]), ket.dtype), [4, 4])
        for ket in kets
    ]
    pairs = zip(tf.unstack(z[:, 0]), kets, strict=True)
    return tf.stack([mean(state(x, prepared=ket)) for x, ket in pairs])


def of_batches(z):
    """Circuits with a batch of their own: two halves of the rows, one number that is a half's."""
    halves = [tf.reduce_sum(tf.stack([z[n : n + 2, 0], z[n : n + 2, 0] ** 2]), 0) for n in (0, 2)]
    return tf.concat([mean(state(half, batch_size=2)) for half in halves], 0)


def mixed(z):
    """Losses: density matrices, for each of which there are two axes a mode."""
    found = []
    for x in tf.unstack(z[:, 0]):
        program = sf.Program(1)
        with program.context as q:
            ops.Dgate(program.params("x")) | q[0]
            ops.LossChannel(0.7) | q[0]
            ops.Sgate(program.params("a")) | q[0]
        engine = TracedEngine("tf", backend_options={"cutoff_dim": 4, "dtype": tf.complex128})
        found.append(engine.run(program, args={"x": x, "a": W[0]}).state.mean_photon(0)[0])
    return tf.stack(found)


#: How many circuits are run in the end.
CALLS = {
    over_data: 1,
    with_the_mean: 1,
    two_kinds: 2,
    the_same: 1,
    fed_forward: 2,
    of_one: 2,
    of_each: 1,
    of_batches: 1,
    mixed: 2,
}


def value_and_gradients(call):
    def found(z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            values = call(z)
            total = tf.reduce_sum(tf.sin(values))
        return [values, *tape.gradient(total, [z, W], unconnected_gradients="zero")]

    return found


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_values_and_gradients_are_those_of_the_call(call) -> None:
    expected = value_and_gradients(call)(Z)
    at_once = tf.function(value_and_gradients(together(call)))
    with circuit.tally() as tally:
        found = at_once(Z)
    assert tally.runs == CALLS[call]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_xla_gives_the_same_for_other_values_too() -> None:
    at_once = tf.function(value_and_gradients(together(with_the_mean)), jit_compile=True)
    for z in (Z, Z[::-1] * 0.5):
        expected = value_and_gradients(with_the_mean)(z)
        for ours, theirs in zip(at_once(z), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_weights_that_all_circuits_share_get_no_batch(monkeypatch) -> None:
    ran = []
    run = circuit.run
    monkeypatch.setattr(circuit, "run", lambda what, *rest: ran.append(what) or run(what, *rest))
    tf.function(together(with_the_mean))(Z)
    (whole,) = (what for what in ran if any(what.batched))
    assert sum(whole.batched) == 1  # x alone


def test_circuits_that_wait_for_each_other_are_run_as_they_come() -> None:
    def chain(z):
        x = z[0, 0]
        for _ in range(4):
            x = mean(state(x))
        return x

    expected = value_and_gradients(chain)(Z)
    with circuit.tally() as tally:
        found = tf.function(value_and_gradients(together(chain)))(Z)
    assert tally.runs == 4
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_those_of_a_branch_of_the_graph_are_run_there() -> None:
    def branching(z):
        beside = [mean(state(x)) for x in tf.unstack(z[:2, 0])]
        chosen = tf.cond(
            z[0, 0] > 0, lambda: mean(state(z[2, 0])), lambda: mean(state(z[3, 0], extra=True))
        )
        return tf.stack([*beside, chosen])

    for z in (Z, -Z):
        np.testing.assert_allclose(tf.function(together(branching))(z), branching(z), atol=1e-10)


def test_a_call_that_runs_other_circuits_the_next_time_is_refused() -> None:
    times = iter(range(10))

    def other(z):
        cutoff = 4 + next(times)
        return tf.stack([mean(state(x, cutoff=cutoff)) for x in tf.unstack(z[:, 0])])

    with pytest.raises(UntraceableError, match="others when it is traced again"):
        tf.function(together(other), autograph=False)(Z)
