"""The traced engine against stock Strawberry Fields: states, gradients, samples, errors."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import sf_compat

sf_compat.install()
import strawberryfields as sf  # noqa: E402
from strawberryfields import ops, utils  # noqa: E402
from strawberryfields.backends import BaseBackend  # noqa: E402
from strawberryfields.backends.tfbackend.backend import TFBackend  # noqa: E402
from strawberryfields.backends.tfbackend.states import FockStateTF  # noqa: E402
from strawberryfields.engine import LocalEngine  # noqa: E402

from workers.engine import TracedEngine  # noqa: E402
from workers.engine.backend import TracedTFBackend  # noqa: E402
from workers.engine.scope import traced_engines  # noqa: E402
from workers.errors import UntraceableError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*disconnected components.*")

VALUES = {"a": 0.3, "b": 0.7, "c": -0.4, "d": 0.2}


def program(build, modes: int = 2) -> sf.Program:
    made = sf.Program(modes)
    with made.context as q:
        build(q, made.params)
    return made


def run(make, made: sf.Program, args, cutoff: int = 5, **options):
    options = {"cutoff_dim": cutoff, "dtype": tf.complex128, **options}
    return make("tf", backend_options=options).run(made, args=args)


def value_and_gradients(make, made, values, compile_to=None, **options):
    """The state, and gradients of a weighted sum of its amplitudes."""
    args = {name: tf.constant(values[name], tf.float64) for name in made.free_params}

    def state(args):
        return run(make, made, args, **options).state.data

    if compile_to:
        state = tf.function(state, jit_compile=compile_to == "xla")
    with tf.GradientTape() as tape:
        tape.watch(args)
        found = state(args)
        rng = np.random.default_rng(0)
        weights = tf.complex(*(tf.constant(rng.normal(size=found.shape)) for _ in range(2)))
        total = tf.math.real(tf.reduce_sum(tf.cast(weights, found.dtype) * found))
    return found.numpy(), tape.gradient(total, args)


def assert_like_stock(made, values, *, batch=None, compile_to=None, atol=1e-10, **options) -> None:
    stock = {"batch_size": batch} if batch else {}
    theirs, slopes = value_and_gradients(sf.Engine, made, values, **options, **stock)
    ours, ours_slopes = value_and_gradients(TracedEngine, made, values, compile_to, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, atol=atol)
    for name, slope in slopes.items():
        if slope is None:
            assert ours_slopes[name] is None
        else:
            np.testing.assert_allclose(ours_slopes[name], slope, atol=10 * atol, err_msg=name)


def every_gate(q, p) -> None:
    a, b, c, d = p("a", "b", "c", "d")
    ops.Dgate(a, b) | q[0]
    ops.Sgate(c, d) | q[1]
    ops.Rgate(2 * a + b) | q[0]
    ops.BSgate(a, d) | (q[0], q[1])
    ops.Kgate(d) | q[1]
    ops.Vgate(a * b) | q[0]
    ops.BSgate(b, c) | (q[1], q[0])
    ops.CKgate(d) | (q[0], q[1])
    ops.S2gate(d, b) | (q[0], q[1])
    ops.MZgate(a, b) | (q[0], q[1])
    ops.Dgate(a, b).H | q[0]
    ops.Xgate(0.3) | q[0]
    ops.Pgate(0.2) | q[1]


def batched(names: str) -> dict:
    rng = np.random.default_rng(3)
    return {n: v + 0.1 * rng.normal(size=3) if n in names else v for n, v in VALUES.items()}


def one_mode(q, p) -> None:
    a, b = p("a", "b")
    ops.Squeezed(a, b) | q[0]
    ops.Dgate(b, a) | q[0]
    ops.Kgate(a) | q[0]


def lossy(q, p) -> None:
    a, b, c, d = p("a", "b", "c", "d")
    ops.Dgate(a, b) | q[0]
    ops.BSgate(b, c) | (q[0], q[1])
    ops.LossChannel(b) | q[0]
    ops.Rgate(c) | q[0]
    ops.LossChannel(a) | q[0]
    ops.Sgate(d, a) | q[1]
    ops.Vgate(d) | q[0]
    ops.BSgate(c, b) | (q[1], q[0])


def prepared(q, p) -> None:
    a, b, c, d = p("a", "b", "c", "d")
    ops.Coherent(a, b) | q[0]
    ops.Squeezed(c, d) | q[1]
    ops.BSgate(a, b) | (q[0], q[1])
    ops.DisplacedSqueezed(a, b, c, d) | q[0]
    ops.Thermal(b) | q[1]
    ops.Dgate(a, b) | q[1]


@pytest.mark.parametrize("compile_to", [None, "graph", "xla"])
@pytest.mark.parametrize("names", ["", "ad", "abcd"], ids=["scalars", "mixed", "batched"])
def test_every_gate(names: str, compile_to: str | None) -> None:
    made = program(every_gate)
    assert_like_stock(made, batched(names), batch=3 if names else None, compile_to=compile_to)


@pytest.mark.parametrize("build", [lossy, prepared, one_mode])
@pytest.mark.parametrize("names", ["", "ad"], ids=["scalars", "mixed"])
def test_mixed_states_and_preparations(build, names: str) -> None:
    made = program(build, 1 if build is one_mode else 2)
    assert_like_stock(made, batched(names), batch=3 if names else None, cutoff=4)
    if names:
        assert_like_stock(made, batched(names), batch=3, cutoff=4, compile_to="xla")


def test_cutoff_two_and_single_precision() -> None:
    made = program(every_gate)
    assert_like_stock(made, VALUES, cutoff=2)
    assert_like_stock(made, VALUES, dtype=tf.complex64, atol=1e-5)


def test_at_zero() -> None:
    """Without the cubic phase: stock differentiates an eigenvalue problem that is degenerate."""

    def build(q, p):
        a, b, c, d = p("a", "b", "c", "d")
        ops.Dgate(a, b) | q[0]
        ops.Sgate(c, d) | q[1]
        ops.BSgate(a, d) | (q[0], q[1])
        ops.Kgate(d) | q[1]

    assert_like_stock(program(build), dict.fromkeys(VALUES, 0.0))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_circuits(data) -> None:
    """Any order of gates on three modes: fusion, blocks and factors are in all combinations."""
    kinds = {
        ops.Dgate: 1, ops.Sgate: 1, ops.Rgate: 1, ops.Kgate: 1, ops.Vgate: 1,
        ops.BSgate: 2, ops.CKgate: 2, ops.S2gate: 2, ops.MZgate: 2,
    }  # fmt: skip
    drawn = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(list(kinds)),
                st.permutations(range(3)),
                st.permutations("abcd"),
            ),
            min_size=1,
            max_size=8,
        )
    )

    def build(q, p):
        for kind, modes, names in drawn:
            count = 1 if kind in (ops.Rgate, ops.Kgate, ops.Vgate, ops.CKgate) else 2
            parameters = [p(name) for name in names[:count]]
            kind(*parameters) | [q[mode] for mode in modes[: kinds[kind]]]
        for name in "abcd":
            ops.Rgate(p(name)) | q[0]

    names = data.draw(st.sampled_from(["", "a", "abcd"]))
    assert_like_stock(program(build, 3), batched(names), batch=3 if names else None, cutoff=3)


DECOMPOSED = {
    "interferometer": lambda q: ops.Interferometer(UNITARY) | q,
    "gaussian transform": lambda q: ops.GaussianTransform(SYMPLECTIC) | q,
    "gaussian state": lambda q: ops.Gaussian(SYMPLECTIC @ SYMPLECTIC.T) | q,
    "graph": lambda q: ops.GraphEmbed(np.array([[0, 1.0], [1, 0]])) | q,
    "gaussian gate": lambda q: ops.Ggate(tf.constant(SYMPLECTIC), tf.zeros(4, tf.float64)) | q,
    "controlled": lambda q: (ops.CXgate(0.2) | q, ops.CZgate(0.1) | q, ops.Fourier | q[0]),
    "cat": lambda q: ops.Catstate(0.7, 0.2) | q[0],
    "fock": lambda q: (ops.Fock(2) | q[0], ops.Vacuum() | q[1]),
    "ket": lambda q: ops.Ket(np.ones((5, 5)) / 5) | q,
    "density matrix": lambda q: ops.DensityMatrix(np.eye(5) / 5) | q[1],
    "delete": lambda q: ops.Del | q[0],
    "post-selected": lambda q: ops.MeasureFock(select=1) | q[0],
    "homodyne": lambda q: ops.MeasureHomodyne(0.3, select=0.2) | q[0],
}
rng = np.random.default_rng(5)
UNITARY = np.linalg.qr(rng.normal(size=(2, 2)) + 1j * rng.normal(size=(2, 2)))[0]
np.random.seed(0)
SYMPLECTIC = utils.random_symplectic(2, scale=0.3)


@pytest.mark.filterwarnings("ignore:.*gradients of a symplectic matrix.*")
@pytest.mark.parametrize("name", DECOMPOSED)
def test_what_strawberry_fields_does_itself(name: str) -> None:
    def build(q, p):
        ops.Dgate(p("a"), p("b")) | q[0]
        ops.BSgate(p("c"), p("d")) | (q[0], q[1])
        DECOMPOSED[name](q)
        ops.Kgate(p("d")) | q[1]

    theirs = run(sf.Engine, program(build), VALUES)
    ours = run(TracedEngine, program(build), VALUES)
    np.testing.assert_allclose(ours.state.data, theirs.state.data, atol=1e-10)
    assert ours.state.is_pure == theirs.state.is_pure
    np.testing.assert_allclose(ours.samples, theirs.samples, atol=1e-10)


@pytest.mark.parametrize("batch", [None, 3])
def test_samples_and_measured_parameters(batch: int | None) -> None:
    def build(q, p):
        ops.Dgate(p("a"), p("b")) | q[0]
        ops.S2gate(p("c")) | (q[0], q[1])
        ops.MeasureX | q[0]
        ops.Xgate(0.5 * q[0].par) | q[1]

    values = batched("a") if batch else VALUES
    values = {name: tf.constant(values[name], tf.float64) for name in "abc"}
    stock = {"batch_size": batch} if batch else {}
    tf.random.set_seed(1)
    theirs = run(sf.Engine, program(build), values, **stock)
    tf.random.set_seed(1)
    ours = run(TracedEngine, program(build), values)
    np.testing.assert_allclose(ours.samples, theirs.samples, atol=1e-10)
    np.testing.assert_allclose(ours.state.data, theirs.state.data, atol=1e-10)


@pytest.mark.parametrize("batch", [2, 40])
def test_a_mode_in_vacuum_when_the_others_have_a_batch(batch: int) -> None:
    """With many samples, what comes after the last gate of a batch is one matrix."""

    def build(q, p):
        ops.Dgate(p("a"), 0.4) | q[0]
        ops.Sgate(0.4, 0.3) | q[1]
        ops.BSgate(0.6, 0.2) | (q[0], q[1])
        ops.Kgate(p("b")) | q[0]
        ops.BSgate(0.3, 0.1) | (q[0], q[1])

    values = {"a": np.linspace(0.1, 0.5, batch), "b": 0.2}
    values = {name: tf.constant(value, tf.float64) for name, value in values.items()}
    assert_like_stock(program(build), values, batch=batch, cutoff=3)


def test_modes_that_come_and_go() -> None:
    def build(q, p):
        ops.Dgate(p("a")) | q[0]
        first, second = ops.New(2)
        ops.BSgate(p("b"), p("c")) | (q[0], first)
        ops.Dgate(p("d")) | second
        ops.Del | q[1]

    assert_like_stock(program(build), VALUES, cutoff=3)


def test_the_methods_of_states() -> None:
    made = program(every_gate)
    ours, theirs = run(TracedEngine, made, VALUES).state, run(sf.Engine, made, VALUES).state
    assert isinstance(ours, FockStateTF)
    for question in (
        lambda s: s.mean_photon(1),
        lambda s: s.quad_expectation(0, 0.3),
        lambda s: s.reduced_dm([1]),
        lambda s: s.fock_prob([1, 2]),
        lambda s: s.all_fock_probs(),
        lambda s: s.trace(),
        lambda s: s.fidelity_vacuum(),
        lambda s: s.fidelity_coherent([0.1, 0.2]),
        lambda s: s.wigner(0, np.array([0.0, 0.5]), np.array([0.1])),
        lambda s: s.dm(),
    ):
        np.testing.assert_allclose(question(ours), question(theirs), atol=1e-10)
    engine = TracedEngine("tf", backend_options={"cutoff_dim": 4})
    engine.run(made, args=VALUES)
    part = engine.backend.state(modes=[1])
    np.testing.assert_allclose(part.dm(), engine.backend.state().reduced_dm([1]), atol=1e-6)


def test_the_engine_is_one_of_strawberry_fields() -> None:
    engine = TracedEngine("tf", backend_options={"cutoff_dim": 4})
    assert isinstance(engine, LocalEngine)
    assert isinstance(engine.backend, BaseBackend)
    made = program(lambda q, p: ops.Sgate(0.3) | q[0])
    engine.run(made)
    engine.run(made)
    assert len(engine.run_progs) == 2
    assert not engine.backend.is_vacuum()
    engine.reset()
    assert engine.backend.is_vacuum()
    with pytest.raises(ValueError, match="fock"):
        TracedEngine("fock")


def test_a_backend_by_itself() -> None:
    for make in (sf.backends.load_backend, None):
        backend = make("tf") if make else TracedTFBackend()
        backend.begin_circuit(2, cutoff_dim=4, dtype=tf.complex128)
        backend.squeeze(0.3, 0.1, 0)
        backend.beamsplitter(0.4, 0.2, 0, 1)
        found = backend.state().ket()
        if make:
            theirs = found
    np.testing.assert_allclose(found, theirs, atol=1e-12)


def test_batches_of_one_and_of_the_size_asked_for() -> None:
    made = program(lambda q, p: ops.Dgate(p("a")) | q[0], 1)
    assert run(TracedEngine, made, {"a": tf.constant([0.2])}).state.data.shape == (1, 5)
    assert run(TracedEngine, made, {"a": 0.2}, batch_size=4).state.data.shape == (4, 5)
    assert run(TracedEngine, made, {"a": 0.2}).state.data.shape == (5,)


def test_a_batch_whose_size_is_not_known_while_tracing() -> None:
    made = program(every_gate)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float64)])
    def state(a):
        return run(TracedEngine, made, {**VALUES, "a": a}).state.ket()

    a = np.array([0.1, 0.4, -0.2])
    theirs = run(sf.Engine, made, {**VALUES, "a": tf.constant(a)}, batch_size=3).state.ket()
    np.testing.assert_allclose(state(a), theirs, atol=1e-10)


def test_a_large_batch_takes_the_shared_tail_as_one_matrix() -> None:
    def build(q, p):
        ops.Dgate(p("a"), p("b")) | q[0]
        ops.Dgate(p("a")) | q[1]
        ops.BSgate(p("c"), p("d")) | (q[0], q[1])
        ops.Sgate(p("c")) | q[0]
        ops.Kgate(p("d")) | q[1]

    values = {**VALUES, "a": np.linspace(-0.4, 0.4, 20)}
    assert_like_stock(program(build), values, batch=20, cutoff=3)


def test_one_circuit_on_prepared_states_with_and_without_a_batch() -> None:
    def build(q, p):
        ops.Dgate(p("a")) | q[0]
        ops.LossChannel(0.5) | q[0]
        ops.Sgate(p("b")) | q[0]

    for names in ("", "a", "", "ab"):
        assert_like_stock(program(build, 1), batched(names), batch=3 if names else None)


def test_gates_whose_phases_cancel() -> None:
    def build(q, p):
        for _ in range(2):
            ops.Dgate(*p("a", "b")) | q[0]

    assert_like_stock(program(build, 1), VALUES)


def test_within_xla_nothing_is_a_function_of_its_own() -> None:
    """XLA takes what goes into one for constants, and would compile at each change of a weight."""
    made = program(every_gate)

    @tf.function(jit_compile=True)
    def slope(a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            total = tf.reduce_sum(tf.abs(run(TracedEngine, made, {**VALUES, "a": a}).state.ket()))
        return tape.gradient(total, a)

    graph = slope.get_concrete_function(tf.TensorSpec([], tf.float64)).graph
    assert not [op.name for op in graph.get_operations() if "PartitionedCall" in op.type]


def test_second_derivatives() -> None:
    def build(q, p):
        a, b, c, d = p("a", "b", "c", "d")
        ops.Dgate(a, b) | q[0]
        ops.Sgate(a, c) | q[1]
        ops.BSgate(a, d) | (q[0], q[1])
        ops.Kgate(a * b) | q[0]

    made = program(build)

    def slope(a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            values = {**VALUES, "a": a}
            photons = run(TracedEngine, made, values, cutoff=4).state.mean_photon(0)[0]
        return tape.gradient(photons, a)

    for call in (slope, tf.function(slope, jit_compile=True)):
        a = tf.constant(0.3, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(a)
            first = call(a)
        numeric = (slope(a + 1e-5) - slope(a - 1e-5)) / 2e-5
        np.testing.assert_allclose(tape.gradient(first, a), numeric, rtol=1e-6)


def test_a_program_that_cannot_be_traced_names_the_operation() -> None:
    counted = ops.MeasureFock(dark_counts=[0.1])
    made = program(lambda q, p: (ops.Dgate(p("a")) | q[0], counted | q[0]))

    @tf.function
    def state(a):
        return run(TracedEngine, made, {"a": a}).state.ket()

    with pytest.raises(UntraceableError, match="MeasureFock"):
        state(tf.constant(0.1))


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        ({"a": 1j}, ValueError, "r cannot be complex"),
        ({"unknown": 0.1}, sf.parameters.ParameterError, "unknown"),
        ({"a": [0.1, 0.2], "b": [0.1, 0.2, 0.3]}, ValueError, "2 for 'a' and 3 for 'b'"),
        ({"a": [[0.1]]}, ValueError, "r can be either a scalar"),
        ({"b": 0.1}, sf.parameters.ParameterError, "a"),
    ],
)
def test_bad_input(args, error, said: str) -> None:
    made = program(lambda q, p: ops.Dgate(*p("a", "b")) | q[0], 1)
    with pytest.raises(error, match=said):
        run(TracedEngine, made, {"b": 0.0, **args} if "b" not in args else args)


def test_nan_goes_through() -> None:
    made = program(lambda q, p: ops.Dgate(p("a")) | q[0], 1)
    assert np.isnan(run(TracedEngine, made, {"a": float("nan")}).state.ket()).all()


def test_traced_engines_in_place_of_stock_ones() -> None:
    options = {"cutoff_dim": 4}
    with traced_engines():
        assert isinstance(sf.Engine("tf", backend_options=options), TracedEngine)
        assert isinstance(sf.LocalEngine("tf", backend_options=options), TracedEngine)
        assert not isinstance(sf.Engine("fock", backend_options=options), TracedEngine)
        with traced_engines(False):
            assert not isinstance(sf.Engine("tf", backend_options=options), TracedEngine)
    assert not isinstance(sf.Engine("tf", backend_options=options), TracedEngine)


def test_equal_names_in_two_programs_have_two_values() -> None:
    from sympy.core.cache import clear_cache

    def build(q, p) -> None:
        ops.Xgate(2 * p("x")) | q[0]  # sympy remembers expressions by what they look like

    def mean(made, x: float) -> float:
        return float(run(TracedEngine, made, {"x": x}, cutoff=8).state.quad_expectation(0)[0])

    first = program(build, 1)
    clear_cache()  # as it does by itself when it is full
    second = program(build, 1)
    for made in (first, second, first):
        assert mean(made, 0.3) == pytest.approx(0.6, abs=1e-4)
        assert mean(made, -0.1) == pytest.approx(-0.2, abs=1e-4)


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("modes", [1, 2])
def test_a_batch_that_comes_in_after_gates_of_weights(how: str, modes: int) -> None:
    def build(q, p) -> None:
        for mode in range(modes):
            ops.Sgate(p("a")) | q[mode]
        if modes == 2:
            ops.BSgate(p("b"), 0.3) | (q[0], q[1])
        ops.Dgate(p("z"), p("c")) | q[0]
        ops.Kgate(0.2) | q[0]
        if modes == 2:
            ops.BSgate(p("z"), p("c")) | (q[1], q[0])
            ops.Rgate(p("z")) | q[1]

    made = program(build, modes)
    # In single precision: that is where TensorFlow has fast kernels, and where one of them erred.
    weights = {name: tf.constant(VALUES[name]) for name in ("ac" if modes == 1 else "abc")}
    batch = tf.constant([0.1, -0.2, 0.4, 0.3, 0.2])
    single = {"cutoff": 5, "dtype": tf.complex64}

    def total(make, z, **options):
        with tf.GradientTape() as tape:
            tape.watch([z, *weights.values()])
            ket = run(make, made, {**weights, "z": z}, **single, **options).state.ket()
            found = tf.reduce_sum(tf.math.real(ket) ** 3 + tf.math.imag(ket))
        return ket, *tape.gradient(found, [z, *weights.values()])

    call = lambda z: total(TracedEngine, z)  # noqa: E731
    if how != "eager":
        call = tf.function(call, jit_compile=how == "xla", autograph=False)
    for ours, theirs in zip(
        call(batch), total(LocalEngine, batch, batch_size=len(batch)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_expectation_values_are_as_precise_in_a_graph() -> None:
    """Strawberry Fields makes ladder operators of Python numbers: single precision in a graph."""
    program = sf.Program(2)
    r = program.params("r")
    with program.context as q:
        ops.Dgate(r, 0.4) | q[0]
        ops.Sgate(0.3) | q[1]
        ops.BSgate(0.5, 0.2) | (q[0], q[1])

    def found(engine_class, r):
        options = {"cutoff_dim": 6, "dtype": tf.complex128}
        state = engine_class("tf", backend_options=options).run(program, args={"r": r}).state
        angle = tf.constant(0.7, tf.float64)
        pairs = [state.quad_expectation(mode, phi) for mode in (0, 1) for phi in (0.0, 0.9, angle)]
        return tf.stack([value for pair in pairs for value in pair])

    r = tf.constant(0.3, tf.float64)
    expected = found(sf.Engine, r)
    for call in (found, tf.function(found), tf.function(found, jit_compile=True)):
        np.testing.assert_allclose(call(TracedEngine, r), expected, rtol=0, atol=1e-13)
    batch = tf.constant([0.1, 0.3], tf.float64)
    np.testing.assert_allclose(found(TracedEngine, batch)[:, 1], expected, rtol=0, atol=1e-13)


def test_a_samples_phase_on_the_vacuum_before_a_gate_that_all_share() -> None:
    """The phase does nothing, and is no reason to make the gate's matrix for each sample."""
    phases = np.array([0.3, 0.7, -1.1])

    def build(program: sf.Program) -> None:
        x = program.params("x")
        with program.context as q:
            ops.Rgate(x) | q[0]
            ops.Kgate(x) | q[1]
            ops.Sgate(0.3, 0.2) | q[0]
            ops.Dgate(0.4) | q[1]
            ops.Rgate(x) | q[1]
            ops.BSgate(0.5, 0.1) | q
            ops.Kgate(2 * x) | q[0]
            ops.CKgate(x) | q
            ops.BSgate(0.2) | q

    found, expected = [], []
    for engine, results in ((TracedEngine, found), (sf.Engine, expected)):
        for sample in (phases, *([[phase]] for phase in phases)):
            program = sf.Program(2)
            build(program)
            options = {"cutoff_dim": 4, "dtype": tf.complex128}
            if engine is sf.Engine and len(sample) > 1:
                options["batch_size"] = len(sample)
            x = tf.Variable(np.squeeze(sample))
            with tf.GradientTape() as tape:
                state = engine("tf", backend_options=options).run(program, args={"x": x}).state
                value = tf.reduce_sum(tf.math.real(state.quad_expectation(0)[0]))
            results += [state.ket().numpy(), tape.gradient(value, x).numpy()]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


PREPARED = [
    (modes, where)
    for modes in (1, 2, 3)
    for where in ([0], [1], [0, 1], [1, 0], [2, 0])
    if max(where) < modes >= len(where)
]


def prepared(make, modes, where, batch, how, state, cutoff=2):
    backend = make()
    backend.begin_circuit(modes, cutoff_dim=cutoff, batch_size=batch, dtype=tf.complex128)
    for mode in range(modes):
        backend.displacement(0.2, 0.1, mode)
    getattr(backend, how)(state, where if len(where) > 1 else where[0])
    backend.rotation(0.3, 0)
    found = backend.state()
    return found.is_pure, found.batched, np.asarray(found.data)


@pytest.mark.parametrize("how", ["prepare_ket_state", "prepare_dm_state"])
@pytest.mark.parametrize(("modes", "where"), PREPARED)
@pytest.mark.parametrize("batch", [None, 2, 3])
def test_a_prepared_state_is_what_its_shape_says(how, modes, where, batch) -> None:
    """Wherever Strawberry Fields makes a state of it, flat or not, with a batch axis or without."""
    cutoff, count = 2, len(where)
    size, rng = cutoff**count, np.random.default_rng(0)
    for rows in (None, 2, 3, 4):
        ket = rng.normal(size=(rows or 1, size)) + 1j * rng.normal(size=(rows or 1, size))
        ket = ket / np.linalg.norm(ket, axis=1, keepdims=True)
        ket = ket if rows else ket[0]
        rho = np.einsum("...i,...j->...ij", ket, ket.conj())
        lead = [rows] if rows else []
        forms = [ket, ket.reshape(lead + [cutoff] * count), rho]
        forms.append(rho.reshape(lead + [cutoff] * (2 * count)))
        for state in forms:
            try:
                pure, batched, stock = prepared(TFBackend, modes, where, batch, how, state)
            except Exception:
                continue
            axes = (cutoff,) * (modes if pure else 2 * modes)
            if stock.shape != (() if batch is None else (batch,)) + axes:
                continue  # no state of that many modes and samples
            ours = prepared(TracedTFBackend, modes, where, batch, how, state)
            assert ours[:2] == (pure, batched)
            np.testing.assert_allclose(ours[2], stock, atol=1e-12)


def test_a_density_matrix_is_shared_by_a_batch_of_another_size() -> None:
    ket = np.array([0.6, 0.0, 0.8j])
    rho = np.outer(ket, ket.conj())
    for how in ("prepare_ket_state", "prepare_dm_state"):
        pure, batched, found = prepared(TracedTFBackend, 1, [0], 2, how, rho, cutoff=3)
        assert (pure, batched, found.shape) == (False, True, (2, 3, 3))
        np.testing.assert_allclose(np.abs(found), np.abs([rho, rho]), atol=1e-12)
    with pytest.raises(ValueError, match="expected one of"):
        prepared(TracedTFBackend, 1, [0], 2, how, np.ones(4), cutoff=3)


@pytest.mark.parametrize("p", [0, 1, 0.5])
@pytest.mark.parametrize("a", [0.0, 0.4, 1.3])
def test_cat_states(a: float, p: float) -> None:
    if a == 0 and p == 1:
        return  # there is no such state
    assert_like_stock(
        program(lambda q, params: (ops.Catstate(a, 0.3, p) | q[0], ops.Rgate(params("a")) | q[0])),
        VALUES,
        compile_to="xla",
    )


def test_cat_states_of_parameters_are_constants_to_a_gradient_as_in_strawberry_fields() -> None:
    made = program(lambda q, params: ops.Catstate(params("a"), 0.3, p=params("b")) | q[0])
    numbers = program(lambda q, _: ops.Catstate(VALUES["a"], 0.3, p=VALUES["b"]) | q[0])
    ours, gradients = value_and_gradients(TracedEngine, made, VALUES, compile_to="xla")
    np.testing.assert_allclose(ours, run(sf.Engine, numbers, {}).state.data, atol=1e-12)
    assert all(gradient is None for gradient in gradients.values())
    batch = {name: tf.constant([value, 0.9], tf.float64) for name, value in VALUES.items()}
    found = run(TracedEngine, made, {name: batch[name] for name in ("a", "b")}).state.data
    np.testing.assert_allclose(found[0], ours, atol=1e-12)


def test_gaussian_gates_of_numbers_are_traced() -> None:
    symplectic = np.diag([1.25, 0.8])
    shift = np.array([0.1, -0.2])

    def build(q, params):
        ops.Dgate(params("a")) | q[0]
        ops.Ggate(symplectic, shift) | q[1]
        ops.BSgate(0.4, params("b")) | (q[0], q[1])

    assert_like_stock(program(build), VALUES, compile_to="graph", atol=1e-9)
