"""What is read of variables, as arrays and as what tapes know of them."""

import pytest
import tensorflow as tf

from qpool.bridge import tapes
from qpool.bridge.variables import TapedReader


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_tapes_see_what_was_read(monkeypatch, count: int, moved: bool) -> None:
    """As of ``Variable.value``: watched if it trains, or by hand; None where nothing depends."""
    if moved:
        monkeypatch.setattr(tapes, "_record", None)
    variables = [tf.Variable(float(n + 2)) for n in range(count)]
    still = tf.Variable(5.0, trainable=False)
    read = TapedReader([*variables, still])
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
    read = TapedReader([x, tf.Variable(1.0)])
    with tf.GradientTape() as outer:
        with tf.GradientTape() as tape:
            value, _ = read.tensors()
            cube = value**3
        slope = tape.gradient(cube, x)
    assert outer.gradient(slope, x).numpy() == 12.0


def test_read_within_a_graphs_tracing() -> None:
    """A model's first call may come while a graph is traced."""
    variables = [tf.Variable(float(n)) for n in range(8)]
    read = TapedReader(variables)
    found = []

    @tf.function
    def traced() -> tf.Tensor:
        with tf.init_scope():
            found.extend(read())
        return tf.constant(0.0)

    traced()
    assert found == list(range(8))
