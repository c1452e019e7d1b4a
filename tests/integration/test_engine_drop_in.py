"""``qpool.Engine`` in the place of ``sf.Engine``."""

from __future__ import annotations

import functools
import inspect
import textwrap

import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from qpool import errors
from workers.engine import TracedEngine

CUTOFF = 5


class Outside:
    """A class as people have it: its own program, its own engine, its own loss."""

    def __init__(self):
        self.program = sf.Program(2)
        names = [f"z{n}" for n in range(2)] + [f"w{n}" for n in range(4)]
        z0, z1, w0, w1, w2, w3 = self.program.params(*names)
        with self.program.context as q:
            ops.Dgate(z0) | q[0]
            ops.Dgate(z1) | q[1]
            ops.BSgate(w0, w1) | (q[0], q[1])
            ops.Sgate(w2) | q[0]
            ops.Kgate(w3) | q[1]
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 5, "batch_size": 6})
        self.weights = tf.Variable([0.3, 0.2, 0.1, -0.1])

    def __call__(self, z):
        if self.engine.run_progs:
            self.engine.reset()
        args = {"z0": z[:, 0], "z1": z[:, 1]}
        args |= {f"w{n}": self.weights[n] for n in range(4)}
        state = self.engine.run(self.program, args=args).state
        return tf.stack([state.quad_expectation(0)[0], state.mean_photon(1)[0]], axis=1)


def swapped(pool) -> type:
    """The same class with one line changed."""
    source = textwrap.dedent(inspect.getsource(Outside))
    line = 'sf.Engine("tf", backend_options={"cutoff_dim": 5, "batch_size": 6})'
    assert source.count(line) == 1
    source = source.replace(line, line.replace("sf.", "qpool.")[:-1] + ", pool=pool)")
    names = {"sf": sf, "ops": ops, "tf": tf, "qpool": qpool, "pool": pool}
    exec(source, names)
    return names["Outside"]


Z = tf.constant(np.random.default_rng(4).normal(size=(6, 2)) * 0.3, tf.float32)


def step(model):
    with tf.GradientTape() as tape:
        tape.watch(Z)
        loss = tf.reduce_sum(tf.sin(model(Z)))
    return [loss, *tape.gradient(loss, [model.weights, Z])]


def test_a_class_from_outside_with_one_line_changed(pool) -> None:
    ours = swapped(pool)()
    for _ in range(2):  # it resets its engine for the second one
        for a, b in zip(step(ours), step(Outside()), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    assert ours.engine.stats()["runs"] == {"pooled": 2, "here": 0}
    ours.engine.close()


def program(*extra) -> sf.Program:
    made = sf.Program(2)
    a, b = made.params("a", "b")
    with made.context as q:
        ops.Dgate(a) | q[0]
        ops.BSgate(0.4, 2 * b) | (q[0], q[1])
        for op, mode in extra:
            op | q[mode]
    return made


OPTIONS = {"cutoff_dim": CUTOFF, "dtype": tf.complex128}


@pytest.fixture(scope="module")
def engine(pool):
    with qpool.Engine("tf", backend_options=OPTIONS, pool=pool) as made:
        yield made


def stock(program, args, **options):
    size = len(args["a"])
    engine = sf.Engine("tf", backend_options=OPTIONS | {"batch_size": size} | options)
    return engine.run(program, args=args)


@pytest.mark.parametrize("loss", [False, True], ids=["pure", "mixed"])
def test_states_are_those_of_stock(engine, loss: bool) -> None:
    made = program((ops.LossChannel(0.8), 0)) if loss else program()
    args = {"a": tf.constant([0.1, 0.2, 0.3], tf.float64), "b": tf.constant(0.3, tf.float64)}
    engine.reset()
    result, expected = engine.run(made, args=args), stock(made, args)
    assert result.state.is_pure is not loss
    assert result.state.batched
    np.testing.assert_allclose(result.state.data, expected.state.data, atol=1e-10)
    np.testing.assert_allclose(result.state.fidelity_vacuum(), expected.state.fidelity_vacuum())
    engine.reset()
    some = engine.run(made, args=args, modes=[1]).state
    np.testing.assert_allclose(some.dm(), expected.state.reduced_dm([1]), atol=1e-10)


def test_inside_a_tf_function_and_twice_differentiable(engine) -> None:
    made = program()

    def photons(a, b):
        engine.reset()
        return engine.run(made, args={"a": a, "b": b}).state.mean_photon(1)[0]

    def bend(a, b):
        with tf.GradientTape() as outer:
            outer.watch(b)
            with tf.GradientTape() as tape:
                tape.watch(a)
                value = tf.reduce_sum(photons(a, b) ** 2)
            slope = tape.gradient(value, a)
        return slope, outer.gradient(slope, b)

    a, b = tf.constant([0.2, 0.5, 0.4], tf.float64), tf.constant(0.3, tf.float64)
    eager, traced = bend(a, b), tf.function(bend)(a, b)
    for x, y in zip(eager, traced, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    # Coherent light on a beamsplitter: <n_1> = (a sin theta)^2, whatever the phase.
    np.testing.assert_allclose(eager[0], 4 * a**3 * np.sin(0.4) ** 4, atol=1e-3)
    np.testing.assert_allclose(eager[1], 0, atol=1e-10)


def test_what_cannot_be_shared_out_runs_here(engine) -> None:
    made = program()
    before = engine.stats()["runs"]["here"]
    engine.reset()
    state = engine.run(made, args={"a": 0.2, "b": 0.3}).state
    assert not state.batched
    engine.reset()
    measuring = program((ops.MeasureFock(), 0))
    samples = engine.run(measuring, args={"a": tf.constant([0.1, 0.2]), "b": 0.1}).samples
    assert samples.shape[0] == 2
    engine.reset()
    assert engine.stats()["runs"]["here"] == before + 2


def test_a_run_that_continues_another(engine) -> None:
    first, second = program(), program()
    args = {"a": tf.constant([0.1, 0.2], tf.float64), "b": tf.constant(0.3, tf.float64)}
    engine.reset()
    engine.run(first, args=args)
    found = engine.run(second, args=args).state
    engine.reset()
    together = engine.run([first, second], args=args).state
    plain = sf.Engine("tf", backend_options=OPTIONS | {"batch_size": 2})
    plain.run(first, args=args)
    expected = plain.run(second, args=args).state
    np.testing.assert_allclose(found.data, expected.data, atol=1e-10)
    np.testing.assert_allclose(together.data, expected.data, atol=1e-10)
    assert len(engine.run_progs) == 2


def test_a_program_built_anew_is_known_again(engine) -> None:
    args = {"a": tf.constant([0.1, 0.2], tf.float64), "b": tf.constant(0.3, tf.float64)}
    counts = []
    for _ in range(3):
        engine.reset()
        engine.run(program(), args=args)
        counts.append(len(engine.stats()["programs"]))
    assert len(set(counts)) == 1


def test_errors_are_those_of_strawberry_fields(engine) -> None:
    engine.reset()
    with pytest.raises(sf.parameters.ParameterError, match="unbound parameter"):
        engine.run(program(), args={"a": tf.constant([0.1, 0.2])})
    engine.reset()
    with pytest.raises(ValueError, match="batch sizes differ"):
        engine.run(program(), args={"a": tf.constant([0.1, 0.2]), "b": tf.constant([0.1] * 3)})
    engine.reset()


def test_a_closed_engine_says_so(pool) -> None:
    made = qpool.Engine("tf", backend_options=OPTIONS, pool=pool)
    made.close()
    with pytest.raises(errors.PoolClosedError, match="engine was closed"):
        made.run(program(), args={"a": tf.constant([0.1]), "b": 0.1})
    with pytest.raises(errors.ConfigurationError, match="workers=5"):
        qpool.Engine("tf", backend_options=OPTIONS, pool=pool, workers=5)


def test_a_program_that_comes_first_inside_a_tf_function(engine) -> None:
    made = program((ops.Rgate(0.1), 0))
    a = tf.constant([0.2, 0.5], tf.float64)

    @tf.function
    def data(a):
        engine.reset()
        return engine.run(made, args={"a": a, "b": 0.3}).state.data

    found = data(a)
    np.testing.assert_allclose(found, stock(made, {"a": a, "b": 0.3}).state.data, atol=1e-10)


def test_other_options_and_an_unused_argument(engine) -> None:
    args = {"a": tf.constant([0.2, 0.5], tf.float64), "b": 0.3}
    try:
        for options in ({"cutoff_dim": 3}, {"dtype": tf.complex64}, {"pure": False}):
            engine.reset(backend_options=options)
            state = engine.run(program(), args=args).state
            expected = stock(program(), args, **options).state
            assert (state.cutoff_dim, state.is_pure) == (expected.cutoff_dim, expected.is_pure)
            np.testing.assert_allclose(state.data, expected.data, atol=1e-6)
            engine.reset(backend_options=OPTIONS | {"pure": True})
    finally:
        engine.reset(backend_options=OPTIONS | {"pure": True})
    made = sf.Program(1)
    made.params("unused")
    with made.context as q:
        ops.Dgate(made.params("a")) | q[0]
    state = engine.run(made, args={"a": 0.2, "unused": np.ones(3)}).state
    assert not state.batched
    engine.reset()


def test_another_hbar_is_not_that_of_a_program_known_before(engine) -> None:
    args = {"a": tf.constant([0.2, 0.5], tf.float64), "b": 0.3}
    made = program((ops.Vgate(0.1), 0))
    engine.reset()
    engine.run(made, args=args)
    former = sf.hbar
    try:
        sf.hbar = 1.0
        engine.reset()
        with pytest.raises(errors.ConfigurationError, match="settings"):
            engine.run(made, args=args)
    finally:
        sf.hbar = former
        engine.reset()


def test_a_tape_keeps_the_programs_that_it_needs(pool, monkeypatch) -> None:
    monkeypatch.setattr("qpool.engine._KEPT", 1)
    a = tf.constant([0.2, 0.5], tf.float64)
    with qpool.Engine("tf", backend_options=OPTIONS, pool=pool) as engine:
        with tf.GradientTape() as tape:
            tape.watch(a)
            total = tf.zeros([], tf.float64)
            for mode in (0, 1):
                engine.reset()
                made = program((ops.Sgate(0.1), mode))
                state = engine.run(made, args={"a": a, "b": 0.3}).state
                total += tf.reduce_sum(state.mean_photon(0)[0])
        assert len(engine.stats()["programs"]) == 1
        assert np.all(np.isfinite(tape.gradient(total, a)))


@pytest.mark.parametrize("within", ["a graph", "XLA", "cpu_batch"])
def test_circuits_that_tensorflow_vectorises(within: str) -> None:
    """``tf.vectorized_map`` over rows, with gates that are made column after column."""
    program = sf.Program(1)
    x, r, alpha = program.params("x", "r", "alpha")
    with program.context as q:
        ops.Sgate(0.2) | q[0]
        ops.Dgate(x) | q[0]
        ops.Sgate(r) | q[0]
        ops.Dgate(alpha) | q[0]
    weights = tf.Variable([0.3, -0.4])

    def read_out(engine, row):
        given = {"x": row, "r": weights[0], "alpha": weights[1]}
        state = engine.run(program, args=given).state
        return tf.stack([state.mean_photon(0)[0], *state.quad_expectation(0)])

    def gradient_of(values, z):
        with tf.GradientTape() as tape:
            found = values(z)
            loss = tf.reduce_sum(found**2)
        return found, tape.gradient(loss, weights)

    def traced(row):
        return read_out(TracedEngine("tf", backend_options={"cutoff_dim": 6}), row)

    def stock(z):
        engine = sf.Engine("tf", backend_options={"cutoff_dim": 6})
        rows = []
        for row in z:
            if engine.run_progs:
                engine.reset()
            rows.append(read_out(engine, row))
        return tf.stack(rows)

    def vectorised(z):
        return tf.vectorized_map(traced, z)

    z = tf.constant([0.5, 0.0, -0.7])
    if within == "cpu_batch":
        with qpool.parallelize(vectorised, strategy="cpu_batch") as generator:
            computed = [gradient_of(generator, z) for _ in range(2)]
            assert generator.stats()["compiled"][0]["level"] == "xla"
    else:
        call = functools.partial(gradient_of, vectorised)
        computed = [tf.function(call, autograph=False, jit_compile=within == "XLA")(z)]
    expected = gradient_of(stock, z)
    for found in computed:
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
