"""What Python decides by a number of the data, a graph decides too, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers.compiling import branches, streams
from workers.compiling.rows import by_rows
from workers.engine import symbols
from workers.errors import UntraceableError

Z = tf.constant([[1.0, 2.0], [-1.0, 3.0], [4.0, 1.0], [-2.0, 2.0], [0.3, 0.2]])
W, V, UNUSED = tf.Variable(0.3), tf.Variable([-0.5, 0.2]), tf.Variable(1.0)


def signs(row):
    """A square root has no gradient but NaN where it is not taken."""
    return W * tf.sqrt(-row[0]) if row[0] < 0 else tf.reduce_sum(V) * tf.sqrt(row[0])


def nested(row):
    if row[0] < 0:
        return row[1] * W
    return row[1] ** 2 if row[1] > 1.5 else tf.reduce_sum(V) * row[0]


def numbers(row):
    return tf.sin(row[1]) if tf.cast(row[0] > 0, tf.int32) else row[1]


def of_rows(one):
    return lambda z: tf.stack([tf.stack([one(row), row[1]]) for row in z])


def compiled(call, *, jit: bool, over=(True,)):
    def traced(*inputs):
        with symbols.answered():
            return by_rows(call, over, {})(*inputs)

    return tf.function(traced, jit_compile=jit, autograph=False)


def value_and_gradients(call, z):
    with tf.GradientTape() as tape:
        tape.watch(z)
        found = call(z)
        total = tf.reduce_sum(found**2)
    return [found, *tape.gradient(total, [z, W, V, UNUSED])]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("one", [signs, nested, numbers])
@pytest.mark.parametrize("rows", [5, 1])
def test_values_and_gradients_are_those_of_python(one, rows: int, jit: bool) -> None:
    ours = value_and_gradients(compiled(of_rows(one), jit=jit), Z[:rows])
    plain = value_and_gradients(of_rows(one), Z[:rows])
    for found, expected in zip(ours, plain, strict=True):
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        elif found is not None:  # the other rows', of which there are none
            np.testing.assert_array_equal(found, tf.zeros_like(found))
    assert ours[-1] is None


@pytest.mark.parametrize("jit", [False, True])
def test_two_tapes_side_by_side_have_a_gradient_each(jit: bool) -> None:
    function, found = compiled(of_rows(signs), jit=jit), []
    for call in (function, of_rows(signs)):
        with tf.GradientTape() as one, tf.GradientTape() as other:
            total = tf.reduce_sum(call(Z))
        found.append([one.gradient(total, W), other.gradient(total, V)])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("one", [signs, nested])
def test_second_derivatives_are_those_of_python(one, jit: bool) -> None:
    found = []
    for call in (compiled(of_rows(one), jit=jit), of_rows(one)):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(Z)
                total = tf.reduce_sum(call(Z) ** 2)
            slope = tf.reduce_sum(inner.gradient(total, Z) ** 2)
        found.append(outer.gradient(slope, [W, V]))
    for ours, plain in zip(*found, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_arguments_for_all_rows_have_their_sums() -> None:
    def call(z, scale):
        return tf.stack([row[1] * scale[0] if row[0] < 0 else row[1] * scale[1] for row in z])

    scale = tf.constant([2.0, 3.0])
    found = []
    for function in (compiled(call, jit=True, over=(True, False)), call):
        with tf.GradientTape() as tape:
            tape.watch(scale)
            total = tf.reduce_sum(function(Z, scale))
        found.append([total, tape.gradient(total, scale)])
    np.testing.assert_allclose(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0], found[1][0])


@pytest.mark.parametrize(
    "coupled",
    [
        lambda z: [row[1] if row[0] < tf.reduce_mean(z) else row[0] for row in z],
        lambda z: [z[n, 1] if z[n - 1, 0] < 0 else z[n, 0] for n in range(len(z))],
        lambda z: [row[1] if z[0, 0] < 0 else row[0] for row in z],
        lambda z: [row[1] if n and row[0] < 0 else row[0] for n, row in enumerate(z)],
    ],
)
def test_a_row_that_others_decide_for_is_refused(coupled) -> None:
    function = compiled(lambda z: tf.stack(coupled(z)), jit=False)
    with pytest.raises(UntraceableError, match="may depend on other rows"):
        function(Z)


def test_what_asks_without_end_is_refused() -> None:
    def halved(row):
        x = row[0]
        while x > 1:
            x = x / 2
        return x

    with pytest.raises(UntraceableError, match="decides"):
        compiled(of_rows(halved), jit=False)(Z)
    with pytest.raises(UntraceableError, match="decides more than"):
        tf.function(branches.followed(answered(halved)), autograph=False)(Z[0])


def answered(call):
    def asked(*inputs):
        with symbols.answered():
            return call(*inputs)

    return asked


def test_no_exception_that_the_call_catches_goes_astray() -> None:
    def catching(row):
        try:
            return signs(row)
        except Exception:  # as public programs have it
            return tf.zeros([])

    ours = compiled(of_rows(catching), jit=True)(Z)
    np.testing.assert_allclose(ours, of_rows(signs)(Z), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_draws_are_the_rows_own_and_the_same_backward(jit: bool) -> None:
    stream = streams.Stream()

    def noisy(row):
        noise = tf.random.normal([2])
        return tf.reduce_sum(noise * V) if row[0] < 0 else noise[1] * W

    def traced(z):
        with stream.call(), symbols.answered():
            return by_rows(lambda z: tf.stack([noisy(row) for row in z]), (True,), {})(z)

    function = tf.function(traced, jit_compile=jit, autograph=False)
    stream.seed(3)
    with tf.GradientTape() as tape:
        found = function(Z)
    of_w, of_v = tape.gradient(found, [W, V])
    assert len(set(found.numpy().tolist())) == len(Z)
    # Both branches are linear in the variables: the gradients say which draws there were.
    np.testing.assert_allclose(tf.reduce_sum(found), of_w * W + tf.reduce_sum(of_v * V), rtol=1e-5)
    stream.seed(3)
    np.testing.assert_array_equal(function(Z), found)
    stream.seed(4)
    assert not np.array_equal(function(Z), found)
