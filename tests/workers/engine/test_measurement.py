"""Outcomes that are drawn: their distribution, and what they leave, are Strawberry Fields'."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from scipy.special import eval_hermite, gammaln

from workers import sf_compat

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

from workers.engine import TracedEngine  # noqa: E402
from workers.engine.scope import traced_engines  # noqa: E402
from workers.errors import UntraceableError  # noqa: E402

#: Samples in one call, and Fock states a mode of pure and of mixed states, which are large.
COUNT, CUTOFFS = 2000, {True: 6, False: 4}


def program(measure, modes: int = 2) -> sf.Program:
    made = sf.Program(modes)
    a = made.params("a")
    with made.context as q:
        ops.Dgate(a, 0.4) | q[0]
        ops.Sgate(0.4, 0.3) | q[1]
        ops.BSgate(0.6, 0.2) | (q[0], q[1])
        if modes == 3:
            ops.S2gate(0.3, 0.1) | (q[1], q[2])
        ops.Kgate(0.2) | q[0]
        measure(q)
    return made


def stock(pure: bool, measure=lambda q: None, modes: int = 2, a: float = 0.5):
    options = {"cutoff_dim": CUTOFFS[pure], "dtype": tf.complex128, "pure": pure}
    return sf.Engine("tf", backend_options=options).run(program(measure, modes), args={"a": a})


def drawn(pure: bool, measure, modes: int = 2, count: int = COUNT) -> np.ndarray:
    """(count, measured) outcomes of one compiled call."""
    options = {"cutoff_dim": CUTOFFS[pure], "dtype": tf.complex128, "pure": pure}
    tf.random.set_seed(2)

    @tf.function
    def call(a):
        engine = TracedEngine("tf", backend_options=options)
        return tf.math.real(engine.run(program(measure, modes), args={"a": a}).samples)

    return call(tf.fill([count], tf.constant(0.5, tf.float64))).numpy()[:, 0]


def distribution(state, mode: int, phi: float):
    """Of cos(phi) x + sin(phi) p, with hbar = 2: by the wave functions of the Fock states."""
    rho = np.asarray(state.reduced_dm(mode))
    n = np.arange(len(rho))
    x = np.linspace(-12, 12, 4001)
    q = x / np.sqrt(2)
    size = np.exp(-0.5 * (n * np.log(2) + gammaln(n + 1))) * np.pi**-0.25
    psi = size[:, None] * np.exp(-(q**2) / 2) * np.stack([eval_hermite(m, q) for m in n])
    turned = np.exp(-1j * phi * n)[:, None] * psi
    density = np.einsum("mx,mn,nx->x", turned, rho, turned.conj()).real
    below = np.cumsum(density)
    return lambda at: np.interp(at, x, below / below[-1])


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize(("mode", "phi"), [(0, 0.0), (1, 0.7), (1, np.pi / 2)])
def test_quadratures_follow_their_distribution(pure: bool, mode: int, phi: float) -> None:
    found = drawn(pure, lambda q: ops.MeasureHomodyne(phi) | q[mode])
    assert found.shape == (COUNT, 1)
    expected = distribution(stock(pure).state, mode, phi)
    assert stats.kstest(found[:, 0], expected).pvalue > 0.01


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("modes", [(1,), (0, 1), (0, 2)])
def test_photon_numbers_follow_their_joint_distribution(pure: bool, modes) -> None:
    found = drawn(pure, lambda q: ops.MeasureFock() | [q[m] for m in modes], 3)
    assert found.shape == (COUNT, len(modes))
    probabilities = np.asarray(stock(pure, modes=3).state.all_fock_probs()).real
    others = tuple(mode for mode in range(3) if mode not in modes)
    probabilities = probabilities.sum(axis=others) / probabilities.sum()
    places = np.ravel_multi_index(found.astype(int).T, probabilities.shape)
    counts = np.bincount(places, minlength=probabilities.size)
    expected = COUNT * probabilities.ravel()
    often = expected > 5
    if expected[~often].sum() > 0:  # what comes seldom, together
        counts = np.append(counts[often], counts[~often].sum())
        expected = np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(counts, expected).pvalue > 0.01


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("kind", ["x", "number"])
def test_what_is_left_is_what_selecting_the_outcome_leaves(pure: bool, kind: str) -> None:
    options = {"cutoff_dim": CUTOFFS[pure], "dtype": tf.complex128, "pure": pure}
    operation = ops.MeasureX if kind == "x" else ops.MeasureFock()
    rows = tf.constant([0.2, 0.5, 0.8, 1.1, 1.3], tf.float64)
    tf.random.set_seed(5)

    @tf.function
    def call(a):
        made = program(lambda q: operation | q[0])
        result = TracedEngine("tf", backend_options=options).run(made, args={"a": a})
        return tf.math.real(result.samples), result.state.data

    outcomes, states = call(rows)
    assert len(set(outcomes.numpy().ravel())) > 1
    for a, outcome, state in zip(rows.numpy(), outcomes.numpy().ravel(), states, strict=True):
        asked = (
            ops.MeasureHomodyne(0.0, select=outcome)
            if kind == "x"
            else ops.MeasureFock(select=int(outcome))
        )
        expected = stock(pure, lambda q, asked=asked: asked | q[0], a=a).state
        np.testing.assert_allclose(state, expected.data, atol=1e-9)


def test_an_outcome_is_a_constant_to_a_gradient_and_what_it_leaves_is_not() -> None:
    options = {"cutoff_dim": CUTOFFS[True], "dtype": tf.complex128}
    a = tf.constant(0.5, tf.float64)

    @tf.function
    def call(a):
        made = program(lambda q: ops.MeasureX | q[0])
        result = TracedEngine("tf", backend_options=options).run(made, args={"a": a})
        return tf.math.real(result.samples)[0, 0], result.state.mean_photon(1)[0]

    with tf.GradientTape(persistent=True) as tape:
        tape.watch(a)
        outcome, photons = call(a)
    assert tape.gradient(outcome, a) in (None, 0)
    with tf.GradientTape() as theirs:
        theirs.watch(a)
        asked = ops.MeasureHomodyne(0.0, select=float(outcome))
        state = stock(True, lambda q: asked | q[0], a=a).state
        expected = state.mean_photon(1)[0]
    np.testing.assert_allclose(photons, expected, atol=1e-9)
    slope = theirs.gradient(expected, a)
    np.testing.assert_allclose(tape.gradient(photons, a), slope, atol=1e-8)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("operation", [ops.MeasureX, ops.MeasureFock()])
def test_samples_look_as_in_strawberry_fields(batch: int | None, operation) -> None:
    values = 0.3 if batch is None else tf.fill([batch], 0.3)
    found = []
    for traced in (False, True):
        own = {"batch_size": batch} if batch and not traced else {}
        with traced_engines(traced):
            engine = sf.Engine("tf", backend_options={"cutoff_dim": 3, **own})
            samples = engine.run(program(lambda q: operation | q[0]), args={"a": values}).samples
        found.append((type(samples), samples.shape, samples.dtype))
    assert found[0] == found[1]


def test_what_is_numpys_alone_is_not_traced() -> None:
    made = program(lambda q: ops.MeasureFock(dark_counts=[0.1]) | q[0])

    @tf.function
    def call(a):
        engine = TracedEngine("tf", backend_options={"cutoff_dim": 3})
        return engine.run(made, args={"a": a}).samples

    with pytest.raises(UntraceableError, match="MeasureFock"):
        call(tf.constant(0.1))
