"""Variables are read as they are now, few or many."""

import numpy as np
import pytest
import tensorflow as tf

from workers import variables as reading
from workers.variables import Reader


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


def test_where_tensorflow_cannot_read_them_at_once_they_are_read_one_by_one(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise tf.errors.InvalidArgumentError(None, None, "on several devices")

    monkeypatch.setattr(reading._execute, "quick_execute", fails)
    read = Reader([tf.Variable(1.0), tf.Variable(2.0)])
    assert read() == [1.0, 2.0]
    assert read() == [1.0, 2.0]


def test_no_variables() -> None:
    assert Reader([])() == []
