"""The models: parameters, values and gradients against programs written by hand, errors."""

from __future__ import annotations

import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from workers.engine.scope import traced_engines

MODES, LAYERS, CUTOFF = 2, 2, 5

#: Encoding -> widths that it takes here.
WIDTHS = [
    ("coherent_state", 4),
    ("coherent_state", 2),
    ("direct_displacement", 2),
    ("angle_encoding", 2),
    ("sparse_parameter", 4),
    ("sparse_parameter", 3),
    ("classical_neural", 3),
]


def rows(batch: int, width: int, scale: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(batch, width)) * scale).astype(np.float32)


def by_hand(model, row: np.ndarray):
    """Strawberry Fields' state for one row, from the formulas."""
    w = {v.name: v.numpy() for v in model.trainable_variables}
    shift = np.zeros((LAYERS, MODES))
    program = sf.Program(MODES)
    with program.context as q:
        encoding = model.encoding_strategy
        if encoding == "classical_neural":
            row = 2 * np.tanh(row @ w["kernel"] + w["bias"])
            encoding = "coherent_state"
        if encoding == "coherent_state":
            for mode in range(MODES):
                both = len(row) == 2 * MODES
                ops.Xgate(row[2 * mode] if both else row[mode]) | q[mode]
                if both:
                    ops.Zgate(row[2 * mode + 1]) | q[mode]
        elif encoding == "direct_displacement":
            for mode in range(MODES):
                ops.Dgate(row[mode]) | q[mode]
        elif encoding == "angle_encoding":
            for mode in range(MODES):
                ops.Dgate(1.0) | q[mode]
                ops.Rgate(row[mode]) | q[mode]
        else:
            shift.flat[: len(row)] = row
        for layer in range(LAYERS):
            p = {name: value[layer] for name, value in w.items() if len(value) == LAYERS}
            ops.BSgate(p["theta_1"][0], p["phi_1"][0]) | (q[0], q[1])
            ops.Rgate(p["rotation_1"][0]) | q[0]
            for mode in range(MODES):
                ops.Sgate(p["squeezing_r"][mode]) | q[mode]
            ops.BSgate(p["theta_2"][0], p["phi_2"][0]) | (q[0], q[1])
            ops.Rgate(p["rotation_2"][0]) | q[0]
            for mode in range(MODES):
                r = p["displacement_r"][mode] + shift[layer, mode]
                ops.Dgate(r, p["displacement_phi"][mode]) | q[mode]
            for mode in range(MODES):
                ops.Kgate(p["kerr"][mode]) | q[mode]
    return sf.Engine("fock", backend_options={"cutoff_dim": CUTOFF}).run(program).state


def features(state, readout: str) -> list[float]:
    if readout == "photons":
        return [state.mean_photon(mode)[0] for mode in range(MODES)]
    angles = (0.0, math.pi / 2) if readout == "quadratures" else (0.0,)
    return [state.quad_expectation(mode, phi)[0] for mode in range(MODES) for phi in angles]


@pytest.mark.parametrize(("encoding", "width"), WIDTHS)
def test_every_encoding_is_its_formula(encoding: str, width: int) -> None:
    model = qpool.models.QuantumSFGenerator(
        latent_dim=width, cutoff_dim=CUTOFF, encoding_strategy=encoding, seed=3
    )
    z = rows(2, width)
    for row, ours in zip(z, model(z).numpy(), strict=True):
        np.testing.assert_allclose(ours, features(by_hand(model, row), "positions"), atol=2e-5)


@pytest.mark.parametrize("readout", ["positions", "quadratures", "photons"])
def test_every_readout_is_an_expectation_value(readout: str) -> None:
    model = qpool.models.QuantumSFGenerator(cutoff_dim=CUTOFF, readout=readout, seed=3)
    z = rows(2, 4)
    for row, ours in zip(z, model(z).numpy(), strict=True):
        np.testing.assert_allclose(ours, features(by_hand(model, row), readout), atol=5e-5)
    np.testing.assert_allclose(model(z)[:1], model(z[:1]), atol=1e-6)


@pytest.mark.parametrize(("encoding", "width"), WIDTHS)
def test_traced_values_and_gradients_are_those_of_stock(encoding: str, width: int) -> None:
    model = qpool.models.QuantumSFGenerator(
        latent_dim=width, cutoff_dim=CUTOFF, encoding_strategy=encoding, seed=3
    )
    z = tf.constant(rows(3, width))
    pooled = qpool.parallelize(model, strategy="cpu_batch")
    found = []
    for call in (model, pooled):
        with traced_engines(False), tf.GradientTape() as tape:
            tape.watch(z)
            loss = tf.reduce_sum(tf.sin(call(z)))
        sources = [v.value for v in model.trainable_variables]
        found.append([loss, *tape.gradient(loss, [*sources, z])])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize(
    "readout", ["positions", "quadratures", "photons", "homodyne", "density", "ket"]
)
def test_read_outs_and_their_gradients_are_those_of_stock(readout: str) -> None:
    z = tf.constant(rows(2, 4))
    found = []
    for traced in (True, False):  # each time anew: of one seed, the weights and draws are the same
        model = qpool.models.QuantumSFGenerator(
            layers=1, cutoff_dim=CUTOFF, readout=readout, seed=3, dtype="float64"
        )
        with traced_engines(traced), tf.GradientTape() as tape:
            tape.watch(z)
            features = model(z)
            loss = tf.reduce_sum(tf.sin(tf.math.real(features)))
        sources = [v.value for v in model.trainable_variables]
        found.append([features, *tape.gradient(loss, [*sources, z])])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7 * max(1.0, np.abs(theirs).max()))


def test_gradients_reach_all_28_of_the_generator_and_all_32_of_the_discriminator() -> None:
    generator = qpool.models.QuantumSFGenerator(cutoff_dim=6, readout="quadratures", seed=0)
    flow = qpool.gradient_flow(generator, lambda m: tf.reduce_sum(m(rows(3, 4)) ** 3))
    assert (flow.flowing, flow.total) == (28, 28), str(flow)
    critic = qpool.models.QuantumSFDiscriminator(cutoff_dim=6, seed=0)
    flow = qpool.gradient_flow(critic, lambda: tf.reduce_sum(critic(rows(3, 2)) ** 3))
    assert (flow.flowing, flow.total) == (32, 32), str(flow)


def test_gradient_flow_counts_and_does_not_assume() -> None:
    class Model:
        def __init__(self) -> None:
            self.used = tf.Variable([1.0, 0.0, 0.0], name="used")
            self.unused = tf.Variable(1.0, name="unused")
            self.trainable_variables = [self.used, self.unused]

    flow = qpool.gradient_flow(Model(), lambda m: tf.reduce_sum(tf.math.log(m.used)))
    assert (flow.flowing, flow.total, flow.zero, flow.not_finite) == (1, 4, 1, 2)
    assert flow.by_variable == {"used:0": (1, 3), "unused:0": (0, 1)}
    assert "unused:0 (0 of 1)" in str(flow)
    with pytest.raises(qpool.errors.InputError, match="real scalar"):
        qpool.gradient_flow(Model(), lambda m: m.used)


def test_gradient_norms_are_those_of_single_samples(pool) -> None:
    model = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=4, seed=0)
    z, cotangent = rows(3, 4), np.ones((3, 2), np.float32)
    with qpool.parallelize(model, pool=pool) as generator:
        norms = qpool.gradient_norms(generator, z, cotangent)
    for n in range(3):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(model(z[n : n + 1]))
        expected = tf.linalg.global_norm(tape.gradient(total, model.trainable_variables))
        np.testing.assert_allclose(norms[n], expected, rtol=1e-5)
    with pytest.raises(qpool.errors.InputError, match="parallelize"):
        qpool.gradient_norms(model, z, cotangent)


def test_a_discriminator_is_a_number_for_each_sample() -> None:
    critic = qpool.models.QuantumSFDiscriminator(cutoff_dim=4, seed=1)
    values = critic(rows(3, 2))
    assert values.shape == (3, 1)
    weights = {v.name: v.numpy() for v in critic.trainable_variables}
    state = critic.state(rows(3, 2))
    columns = [
        state.quad_expectation(m, phi)[0].numpy() for m in range(2) for phi in (0, math.pi / 2)
    ]
    expected = np.stack(columns, 1) @ weights["combination"]
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_another_process_loads_a_saved_one(tmp_path) -> None:
    model = qpool.models.QuantumSFGenerator(n_modes=1, latent_dim=2, layers=1, cutoff_dim=3)
    model(rows(2, 2))
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, keras, qpool.models\n"
        "print(type(keras.saving.load_model(sys.argv[1])).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.keras")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QuantumSFGenerator"]


@pytest.mark.parametrize("encoding", ["coherent_state", "classical_neural"])
@pytest.mark.parametrize("kind", ["QuantumSFGenerator", "QuantumSFDiscriminator"])
def test_saved_and_loaded_bit_for_bit(tmp_path, kind: str, encoding: str) -> None:
    width = {"QuantumSFGenerator": "latent_dim", "QuantumSFDiscriminator": "input_dim"}[kind]
    options = {width: 4, "layers": 1, "cutoff_dim": 4, "encoding_strategy": encoding}
    model = getattr(qpool.models, kind)(**options)
    expected = model(rows(2, 4)).numpy()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(again(rows(2, 4)), expected)
    lines: list[str] = []
    again.summary(print_fn=lambda line, **_: lines.append(line))
    assert kind.lower()[:7] in "".join(lines).lower().replace("_", "")


@pytest.mark.parametrize("modes", [1, 3])
def test_other_numbers_of_modes(modes: int) -> None:
    model = qpool.models.QuantumSFGenerator(
        n_modes=modes, latent_dim=2 * modes, layers=1, cutoff_dim=3, seed=1
    )
    assert model(tf.zeros((2, 2 * modes))).shape == (2, modes)


class Squeezed(qpool.models.Encoding):
    """An encoding of the user's own."""

    formula = "S(z_k) |0> on mode k"
    needs = "n_modes numbers"

    def fits(self, width, modes, layers):
        return width == modes

    def width(self, modes, layers):
        return modes

    def gates(self, program, q, width):
        for mode in range(len(q)):
            ops.Sgate(program.params(f"z_{mode}")) | q[mode]


def test_an_encoding_of_ones_own() -> None:
    qpool.models.register_encoding("squeezed", Squeezed())
    model = qpool.models.QuantumSFGenerator(
        latent_dim=2, layers=1, cutoff_dim=9, encoding_strategy="squeezed", readout="photons"
    )
    for name in ("theta_1", "theta_2", "squeezing_r", "displacement_r"):
        model._blocks[name].assign(tf.zeros_like(model._blocks[name]))
    found = model(np.float32([[0.3, 0.0]]))
    np.testing.assert_allclose(found, [[math.sinh(0.3) ** 2, 0.0]], atol=1e-4)
    with pytest.raises(qpool.errors.ConfigurationError, match="already"):
        qpool.models.register_encoding("coherent_state", Squeezed())
    with pytest.raises(qpool.errors.ConfigurationError, match="instance of"):
        qpool.models.register_encoding("squeezed", Squeezed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_dim": 3}, r"takes 2 n_modes numbers .*latent_dim=3 with n_modes=2"),
        ({"latent_dim": 5, "encoding_strategy": "sparse_parameter"}, r"1 to n_modes \* layers"),
        ({"encoding_strategy": "coherent"}, "did you mean 'coherent_state'"),
        ({"readout": "photon"}, "did you mean 'photons'"),
        ({"cutoff_dim": 1}, "cutoff_dim"),
        ({"layers": 0}, "layers"),
        ({"n_modes": 0}, "n_modes"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(qpool.errors.ConfigurationError, match=words):
        qpool.models.QuantumSFGenerator(**options)


def test_rows_of_the_wrong_width() -> None:
    model = qpool.models.QuantumSFGenerator(layers=1, cutoff_dim=3)
    with pytest.raises(qpool.errors.InputError, match=r"\(batch, 4\).*latent_dim"):
        model(tf.zeros((2, 3)))
