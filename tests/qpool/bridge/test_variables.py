"""Variables are read as they are now, few or many."""

import numpy as np
import pytest
import tensorflow as tf

from qpool.bridge import tapes, variables
from qpool.bridge.variables import Reader


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_values_are_those_of_now(count: int) -> None:
    dtypes = [tf.float32, tf.float64, tf.complex128, tf.int64]
    variables = [
        tf.Variable(tf.cast(tf.reshape(tf.range(n, n + 6), (2, 3)), dtypes[n % 4]))
        for n in range(count)
    ]
    read = Reader(variables)
    before = read()
    for variable in variables:
        variable.assign(3 * variable + 1)
    for variable, was, now in zip(variables, before, read(), strict=True):
        assert now.dtype == was.dtype == variable.dtype.as_numpy_dtype
        np.testing.assert_array_equal(now, variable.numpy())
        np.testing.assert_array_equal(now, 3 * was + 1)  # what was read before stays as it was


def test_reading_leaves_a_tape_alone() -> None:
    variables = [tf.Variable(float(n)) for n in range(8)]
    read = Reader(variables)
    with tf.GradientTape() as tape:
        total = tf.add_n([v * v for v in variables])
        values = read()
    assert values == list(range(8))
    assert tape.gradient(total, variables[3]).numpy() == 6.0


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_tapes_see_what_was_read(monkeypatch, count: int, moved: bool) -> None:
    """As of ``Variable.value``: watched if it trains, or by hand; None where nothing depends."""
    if moved:
        monkeypatch.setattr(tapes, "_record", None)
    variables = [tf.Variable(float(n + 2)) for n in range(count)]
    still = tf.Variable(5.0, trainable=False)
    read = Reader([*variables, still])
    with tf.GradientTape(persistent=True) as tape:
        *values, fixed = read.tensors()
        total = values[0] ** 3 * fixed
    assert tape.gradient(total, variables[0]).numpy() == 3 * 2.0**2 * 5
    assert [tape.gradient(total, v) for v in (*variables[1:], still)] == [None] * count
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(still)
        total = tf.add_n(read.tensors())
    assert [x is None for x in tape.gradient(total, [*variables, still])] == [
        *[True] * count,
        False,
    ]


def test_a_second_derivative_goes_through_what_was_read() -> None:
    x = tf.Variable(2.0)
    read = Reader([x, tf.Variable(1.0)])
    with tf.GradientTape() as outer:
        with tf.GradientTape() as tape:
            value, _ = read.tensors()
            cube = value**3
        slope = tape.gradient(cube, x)
    assert outer.gradient(slope, x).numpy() == 12.0


def test_where_tensorflow_cannot_read_them_at_once_they_are_read_one_by_one(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise tf.errors.InvalidArgumentError(None, None, "on several devices")

    monkeypatch.setattr(variables._execute, "quick_execute", fails)
    read = Reader([tf.Variable(1.0), tf.Variable(2.0)])
    assert read() == [1.0, 2.0]
    assert read() == [1.0, 2.0]


def test_no_variables() -> None:
    assert Reader([])() == []


def test_read_within_a_graphs_tracing() -> None:
    """A model's first call may come while a graph is traced."""
    variables = [tf.Variable(float(n)) for n in range(8)]
    read = Reader(variables)
    found = []

    @tf.function
    def traced() -> tf.Tensor:
        with tf.init_scope():
            found.extend(read())
        return tf.constant(0.0)

    traced()
    assert found == list(range(8))
