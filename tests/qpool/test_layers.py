"""Any program as a Keras layer: values, gradients, saving, and what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from qpool import programs
from qpool.errors import ConfigurationError, InputError
from workers.engine.scope import traced_engines


def program() -> sf.Program:
    """Free parameters alone, in an expression, and twice; an inverse gate; a matrix."""
    made = sf.Program(2)
    x, y, theta, r = made.params("x", "y", "theta", "r")
    with made.context as q:
        ops.Dgate(x) | q[0]
        ops.Sgate(2 * r + 0.1, 0.3) | q[1]
        ops.BSgate(theta, y / 3) | (q[0], q[1])
        ops.Sgate(r).H | q[0]
        ops.Interferometer(np.array([[0.6, 0.8], [-0.8, 0.6]])) | (q[0], q[1])
    return made


def layer(**options):
    given = {"inputs": ("x", "y"), "cutoff_dim": 5, "initial": {"theta": 0.7, "r": 0.2}}
    return qpool.CircuitLayer(program(), **(given | options))


X = np.random.default_rng(2).normal(size=(3, 2)) * 0.4


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients_are_those_of_stock(dtype: str, atol: float, batch: int) -> None:
    made = layer(dtype=dtype)
    x = tf.constant(X[:batch], dtype)
    found = []
    for stock in (False, True):
        with traced_engines(not stock), tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(made(x)))
        found.append([loss, *tape.gradient(loss, [made.parameters.value, x])])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def test_in_a_keras_model_that_is_fitted_saved_and_loaded(tmp_path) -> None:
    """Compiled by Keras without a pool; the loaded model gives the same bits."""
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(1)(layer(readout="photons", name="circuit")(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    target = X.sum(1, keepdims=True)
    history = model.fit(X, target, epochs=8, verbose=0, batch_size=3).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(X), model(X))
    assert again.get_layer("circuit").trainable_parameters == ("theta", "r")
    lines: list[str] = []
    again.summary(print_fn=lambda line, **_: lines.append(line))
    assert "circuit" in "".join(lines)


def test_in_the_pool(pool) -> None:
    made = layer()
    x = tf.constant(X, tf.float32)
    with qpool.parallelize(made, pool=pool) as pooled:
        found = []
        for call in (pooled, made):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.sin(call(x)))
            found.append([loss, tape.gradient(loss, made.parameters.value)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("readout", "shape"),
    [("positions", (3, 2)), ("density", (3, 40, 40)), ("ket", (3, 5, 5)), ("homodyne", (3, 2))],
)
def test_what_is_read_out(readout: str, shape: tuple[int, ...]) -> None:
    made = layer(readout=readout, seed=1)
    assert made(X).shape == shape
    symbolic = made(keras.Input((2,)))
    assert tuple(symbolic.shape) == (None, *shape[1:])
    assert symbolic.dtype == made(X).dtype.name


def test_all_parameters_fed() -> None:
    made = layer(inputs=("x", "y", "theta", "r"), initial=None)
    assert made.weights == []
    assert made(np.zeros((2, 4))).shape == (2, 4)


def test_a_program_as_text_comes_back_the_same() -> None:
    text = programs.as_text(program())
    again = programs.from_text(text)
    assert programs.as_text(again) == text
    options = {"backend_options": {"cutoff_dim": 5}}
    args = {"x": 0.2, "y": 0.3, "theta": 0.4, "r": 0.1}
    kets = [sf.Engine("fock", **options).run(p, args=args).state.ket() for p in (program(), again)]
    np.testing.assert_allclose(*kets, atol=1e-15)


def test_a_fingerprint_tells_programs_apart() -> None:
    def one(angle, mode=0, dagger=False):
        made = sf.Program(2)
        gate = ops.Rgate(angle)
        with made.context as q:
            (gate.H if dagger else gate) | q[mode]
        return programs.fingerprint(made)

    assert one(0.3) == one(0.3)
    assert len({one(0.3), one(0.4), one(0.3, 1), one(0.3, dagger=True)}) == 4


def without_parameters() -> sf.Program:
    made = sf.Program(1)
    with made.context as q:
        ops.Dgate(0.1) | q[0]
    return made


def measuring() -> sf.Program:
    made = sf.Program(1)
    with made.context as q:
        ops.Dgate(made.params("x")) | q[0]
        ops.MeasureX | q[0]
    return made


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"program": without_parameters()}, "no free parameters"),
        ({"program": measuring(), "inputs": ("x",)}, "MeasureX.*homodyne"),
        ({"inputs": ("x", "z")}, "'z'.*no free parameter"),
        ({"trainable_parameters": ("x", "theta", "r")}, r"\['x'\] named as input and as trainable"),
        ({"trainable_parameters": ("theta",)}, r"\['r'\].*neither inputs nor trainable"),
        ({"inputs": ("x", "x")}, "twice"),
        ({"inputs": ()}, "needs inputs"),
        ({"readout": "photon"}, "did you mean 'photons'"),
        ({"initial": {"thet": 0.1}}, "'thet'.*did you mean 'theta'"),
        ({"cutoff_dim": 1}, "cutoff_dim"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    given = {"program": program(), "inputs": ("x", "y")} | options
    with pytest.raises(ConfigurationError, match=words):
        qpool.CircuitLayer(**given)


def test_rows_of_the_wrong_width() -> None:
    with pytest.raises(InputError, match=r"\(batch, 2\).*'x', 'y'"):
        layer()(np.zeros((2, 3)))


def test_a_saved_layer_of_another_format_is_refused() -> None:
    config = layer().get_config()
    assert qpool.CircuitLayer.from_config(config).get_config() == config
    with pytest.raises(ConfigurationError, match="saved in format 99"):
        qpool.CircuitLayer.from_config({**config, "format": 99})


def test_a_program_that_cannot_be_written_says_so() -> None:
    made = sf.Program(1)
    x = made.params("x")
    with made.context as q:
        ops.Ket(np.array([0.6, 0.8, 0, 0, 0])) | q[0]
        ops.Rgate(x) | q[0]
    with pytest.raises(ConfigurationError, match="cannot be saved"):
        qpool.CircuitLayer(made, inputs=("x",), cutoff_dim=5).get_config()
