"""Sizes are numbers while a graph is traced, where they are known; nothing else is."""

from __future__ import annotations

import cloudpickle
import numpy as np
import pytest
import tensorflow as tf

from workers.engine import symbols

GRID = tf.linspace(0.0, 8.0, 3)
Z = tf.reshape(tf.range(6.0), [3, 2])

LOOPS = {
    "rows": lambda z: [row * 2 for row in z],
    "range": lambda z: [z[i] * 2 for i in range(tf.shape(z)[0])],
    "length": lambda z: [z[i] * 2 for i in range(len(z))],
    "number": lambda z: [z[i] * 2 for i in range(int(tf.shape(z)[0] - 0))],
    "map_fn": lambda z: tf.unstack(tf.map_fn(lambda row: row * 2, z)),
    "decided": lambda z: [row * 2 if tf.rank(row) > 0 else row for row in z],
    "float": lambda z: [row * float(tf.shape(z)[1]) for row in z],
    "numpy": lambda z: [row * (GRID[1] - tf.linspace(0.0, 8.0, 5)[1]).numpy() for row in z],
    "constant": lambda z: [tf.constant(row * 2, dtype=tf.float32) for row in z],
    "array": lambda z: [row * np.sqrt(np.asarray(GRID)[1]) for row in z],
    "zip": lambda z: [a * 2 for a, _ in zip(z, tf.reshape(z, [-1]), strict=False)],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_in_python_is_traced_as_it_runs(loop: str) -> None:
    def call(z):
        with symbols.answered():
            return tf.stack(LOOPS[loop](z))

    traced = tf.function(call, autograph=False)
    assert traced(Z).numpy().tolist() == (2 * Z).numpy().tolist()


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: bool(z[0, 0] > 0),
        lambda z: float(z[0, 0]),
        lambda z: range(tf.cast(z[0, 0], tf.int32)),
        lambda z: z[0].numpy(),
        lambda z: np.asarray(z[0]),
    ],
)
def test_what_is_not_known_is_refused(ask) -> None:
    def call(z):
        with symbols.answered():
            ask(z)
            return z

    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        tf.function(call, autograph=False)(Z)


def test_what_has_no_number_says_so_to_hasattr() -> None:
    seen = []

    def call(z):
        with symbols.answered():
            seen.extend(hasattr(x, "numpy") for x in (z, GRID + 1.0, tf.linspace(0.0, 1.0, 300)))
        seen.append(hasattr(tf.linspace(0.0, 1.0, 3), "numpy"))
        return z

    tf.function(call, autograph=False)(Z)
    assert seen == [False, True, True, False]


def test_what_stands_for_a_function_of_tensorflow_travels_as_it_does() -> None:
    with symbols.answered():
        pass
    for function in (tf.constant, tf.map_fn):
        assert cloudpickle.loads(cloudpickle.dumps(function)) is function

    def positive(x):
        if x > 2:  # which AutoGraph converts, also within
            return tf.constant(1.0)
        return tf.constant(0.0)

    found = tf.function(lambda z: tf.map_fn(positive, z))(tf.range(5.0))
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 1])


def test_outside_nothing_is_answered() -> None:
    def call(z):
        with symbols.answered():
            pass
        return tf.stack(list(z))

    with pytest.raises(TypeError, match="not allowed"):
        tf.function(call, autograph=False)(Z)
    looped = tf.function(lambda z: tf.map_fn(lambda row: row, z), autograph=False)
    operations = {op.type for op in looped.get_concrete_function(Z).graph.get_operations()}
    assert operations & {"While", "StatelessWhile"}
