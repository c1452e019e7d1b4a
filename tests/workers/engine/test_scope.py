"""Engines that a model holds: traced within a scope, the model's own outside of it."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from workers import sf_compat
from workers.errors import StatefulCallError, UntraceableError

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

from workers.engine import TracedEngine, circuit  # noqa: E402
from workers.engine.scope import StandIn, reset_before, traced_engines  # noqa: E402

GLOBAL = sf.Engine("tf", backend_options={"cutoff_dim": 5})
X = tf.constant([0.1, -0.3, 0.4])


def program() -> sf.Program:
    made = sf.Program(2)
    x = made.params("x")
    with made.context as q:
        ops.Dgate(x, 0.2) | q[0]
        ops.Sgate(0.3) | q[1]
        ops.BSgate(0.4, x) | (q[0], q[1])
    return made


PROGRAM = program()


def photons(engine, x, **options) -> tf.Tensor:
    if engine.run_progs:
        engine.reset()
    return engine.run(PROGRAM, args={"x": x}, **options).state.mean_photon(0)[0]


def new(**options) -> sf.Engine:
    return sf.Engine("tf", backend_options={"cutoff_dim": 5, **options})


HOLDERS = {
    "attribute": lambda e: (types.SimpleNamespace(engine=e), lambda h: h.engine),
    "list": lambda e: ([e], lambda h: h[0]),
    "dict": lambda e: ({"engine": e}, lambda h: h["engine"]),
    "closure": lambda e: (lambda: e, lambda h: h()),
    "global": lambda _: (None, lambda h: GLOBAL),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_wherever_an_engine_is_held_it_can_be_traced(holder: str) -> None:
    held, get = HOLDERS[holder](new())
    stock = [float(photons(get(held), x)) for x in X]

    @tf.function(jit_compile=True)
    def traced(x):
        with traced_engines():
            return photons(get(held), x)

    np.testing.assert_allclose(traced(X), stock, atol=2e-6)
    assert type(get(held)) is sf.Engine
    assert float(photons(get(held), X[0])) == stock[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 3},
        {"batch_size": None},
        {"pure": False},
        {"dtype": tf.complex128},
        {"pure": True, "eval": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("ran", [False, True])
def test_with_every_option_and_whether_it_was_run_before(options, ran: bool) -> None:
    engine = new(**options)
    batched = "batch_size" in options and options["batch_size"]
    stock = new(**options)
    expected = photons(stock, X) if batched else tf.stack([photons(stock, x) for x in X])
    if ran:
        photons(engine, X if batched else X[0])

    @tf.function
    def traced(x):
        with traced_engines():
            return photons(engine, x)

    np.testing.assert_allclose(traced(X), expected, atol=2e-6)
    assert len(engine.run_progs) == ran


def test_a_batch_of_one_has_an_axis_where_strawberry_fields_refuses_it() -> None:
    engine = new(batch_size=1)
    with pytest.raises(ValueError, match="batch_size of 1"):
        photons(engine, X[:1])
    with traced_engines():
        assert photons(engine, X[:1]).shape == (1,)


def test_what_goes_on_with_an_earlier_calls_state_does_so_eagerly_and_is_not_traced() -> None:
    engine, stock = new(), new()
    for one in (engine, stock):
        one.run(PROGRAM, args={"x": 0.1})
    for x in (0.2, 0.3):
        with traced_engines():
            ours = engine.run(PROGRAM, args={"x": x}).state.ket()
        np.testing.assert_allclose(ours, stock.run(PROGRAM, args={"x": x}).state.ket(), atol=2e-6)

    def traced(x):
        with traced_engines():
            return engine.run(PROGRAM, args={"x": x}).state.ket()

    with pytest.raises(UntraceableError, match=r"engine\.reset"):
        tf.function(traced, autograph=False)(X)
    assert len(engine.run_progs) == len(stock.run_progs) == 3


def test_outside_of_calls_an_engine_has_been_run_and_is_reset_as_in_them() -> None:
    engine = new()
    args = {"x": X}
    for _ in range(3):
        if engine.run_progs:
            engine.reset()
        with traced_engines(), circuit.tally() as run:
            found = engine.run(PROGRAM, args=args).state.mean_photon(0)[0]
        assert (run.went_on, len(run.began)) == (False, 1)
        with traced_engines():
            np.testing.assert_allclose(found, photons(new(), X), rtol=1e-5)
    assert len(engine.run_progs) == 1
    engine.reset({"cutoff_dim": 6})
    assert (engine.run_progs, engine.backend_options["cutoff_dim"]) == ([], 6)


def test_what_was_compiled_for_engines_that_are_reset_before_says_so() -> None:
    engine = new()

    def run(x):
        with traced_engines():
            return engine.run(PROGRAM, args={"x": x}).state.mean_photon(0)[0]

    with circuit.tally() as first:
        expected = run(X)
    (standing,) = first.began
    with pytest.raises(UntraceableError, match=r"call engine\.reset\(\)"):
        tf.function(run).get_concrete_function(X)
    with reset_before():
        compiled = tf.function(run).get_concrete_function(X)
    np.testing.assert_allclose(compiled(X), expected, rtol=1e-5)
    standing.has_run()
    with pytest.raises(StatefulCallError, match="was not reset before this call"):
        run(X)
    engine.reset()
    np.testing.assert_allclose(run(X), expected, rtol=1e-5)


@pytest.mark.parametrize("held", [True, False], ids=["held", "made in a scope"])
def test_a_state_that_is_replaced_altogether_is_of_no_matter(held: bool) -> None:
    program = sf.Program(2)
    with program.context as q:
        ops.Ket(program.params("ket")) | q
        ops.BSgate(0.6, 0.3) | q
    with traced_engines(not held):
        engine = new()
    stock = new()
    kets = np.random.default_rng(0).normal(size=(3, 5, 5)).astype("complex64")

    @tf.function(autograph=False)
    def traced(ket):
        with traced_engines():
            return engine.run(program, args={"ket": ket}).state.ket()

    for ket in kets:
        expected = stock.run(program, args={"ket": ket}).state.ket()
        np.testing.assert_allclose(traced(tf.constant(ket)), expected, atol=3e-6)
        with traced_engines(), circuit.tally() as run:
            ours = engine.run(program, args={"ket": ket}).state.ket()
        np.testing.assert_allclose(ours, expected, atol=3e-6)
        assert (run.runs, run.went_on) == (1, False)


def test_modes_that_are_prepared_one_by_one_are_traced_out_of_what_was_there() -> None:
    engine, program = new(), sf.Program(2)
    with program.context as q:
        ops.Coherent(0.1) | q[0]
        ops.Coherent(0.2) | q[1]
        ops.BSgate(0.4, 0.0) | (q[0], q[1])
    for went_on in (False, True):
        with traced_engines(), circuit.tally() as run:
            state = engine.run(program).state
        assert (run.went_on, state.is_pure) == (went_on, False)


def test_programs_run_one_after_another_in_one_call_are_traced() -> None:
    engine = new()

    def call(x):
        if engine.run_progs:
            engine.reset()
        engine.run(PROGRAM, args={"x": x})
        return engine.run(PROGRAM, args={"x": 2 * x}).state.mean_photon(1)[0]

    expected = [float(call(x)) for x in X]

    @tf.function(autograph=False)
    def traced(x):
        with traced_engines():
            return call(x)

    np.testing.assert_allclose(traced(X), expected, atol=2e-6)
    np.testing.assert_allclose(traced(X), expected, atol=2e-6)


def test_options_that_change_and_engines_of_other_backends() -> None:
    engine, gaussian = new(), sf.Engine("gaussian")
    with traced_engines():
        assert engine.run(PROGRAM, args={"x": 0.1}).state.cutoff_dim == 5
        assert isinstance(engine.run.__self__, StandIn)
    engine.backend_options["cutoff_dim"] = 7
    with traced_engines() as scope:
        assert engine.run(PROGRAM, args={"x": 0.1}).state.cutoff_dim == 7
        gaussian.run(PROGRAM, args={"x": 0.1})
    assert scope.left_alone == {"gaussian"}
    with traced_engines(False):
        assert engine.run.__self__ is engine
        assert type(sf.Engine("tf", backend_options={"cutoff_dim": 3})) is sf.Engine
    with traced_engines():
        assert isinstance(sf.Engine("tf", backend_options={"cutoff_dim": 3}), TracedEngine)


def test_by_its_backend_models_ask_too_whether_an_engine_has_been_run() -> None:
    engine = new()

    def step(x) -> tf.Tensor:
        if getattr(engine.backend, "_modemap", None) is not None:
            engine.reset()
        return engine.run(PROGRAM, args={"x": x}).state.mean_photon(0)[0]

    expected = [step(x) for x in X]
    with traced_engines():
        np.testing.assert_allclose(step(X[1]), expected[1], atol=1e-6)
        np.testing.assert_allclose(tf.function(step)(X[2]), expected[2], atol=1e-6)


def test_an_outcome_that_is_asked_for_feeds_a_gate_within_a_graph() -> None:
    """It is a constant there, and complex, as Strawberry Fields has it."""
    teleported = sf.Program(2)
    with teleported.context as q:
        ops.S2gate(0.4) | (q[0], q[1])
        ops.Dgate(teleported.params("x")) | q[0]
        ops.MeasureHomodyne(0, select=0.3) | q[0]
        ops.Xgate(q[0].par * np.sqrt(2)) | q[1]

    def step(x) -> tf.Tensor:
        return new().run(teleported, args={"x": x}).state.quad_expectation(1)[0]

    with traced_engines():
        found = tf.function(step)(X[0])
    np.testing.assert_allclose(found, step(X[0]), atol=1e-5)


@pytest.mark.parametrize("traced", [True, False])
def test_parameters_have_back_what_was_bound_to_them_before_a_graph(traced: bool) -> None:
    """Its tensors would keep it for as long as there are parameters of these names."""
    made, own = program(), TracedEngine("tf", backend_options={"cutoff_dim": 5})
    held = new()
    made.bind_params({"x": 0.5})

    @tf.function(autograph=False)
    def twice(x: tf.Tensor) -> tf.Tensor:
        with traced_engines():
            engine = held if traced else own
            engine.run(made, args={"x": x})
            engine.reset()
            again = {} if traced else {"args": {"x": x}}  # in a scope they stay bound to its end
            return engine.run(made, **again).state.mean_photon(0)[0]

    found = twice(X)
    assert made.free_params["x"].val == 0.5
    own.reset()
    del made.free_params["x"].val  # as in one that has been unpickled
    twice(X[:2])
    assert made.free_params["x"].val is None
    other = TracedEngine("tf", backend_options={"cutoff_dim": 5})
    np.testing.assert_allclose(found, photons(other, X), atol=1e-6)
