"""Draws from the global generator, taken over by a stream of a key."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers.compiling import rows, streams
from workers.compiling.streams import Stream
from workers.errors import UntraceableError

DRAWS = {
    "normal": lambda: tf.random.normal([400], 1.0, 2.0),
    "truncated": lambda: tf.random.truncated_normal([400], dtype=tf.float64),
    "uniform": lambda: tf.random.uniform([400], -1.0, 3.0),
    "whole numbers": lambda: tf.random.uniform([400], 2, 9, tf.int32),
    "dropout": lambda: tf.nn.dropout(tf.ones(400), 0.25),
}
MEANS = {"normal": 1.0, "truncated": 0.0, "uniform": 1.0, "whole numbers": 5.0, "dropout": 1.0}


@pytest.fixture
def stream() -> Stream:
    found = Stream()
    found.seed(7)
    return found


def drawn(stream, draw, times=1):
    with stream.call():
        return [draw().numpy() for _ in range(times)]


@pytest.mark.parametrize("name", DRAWS)
def test_a_key_gives_draws_eagerly_and_compiled(stream, name: str) -> None:
    draw = DRAWS[name]
    first, second = drawn(stream, draw, 2)
    assert stream.taken == 2
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(drawn(stream, draw)[0], first)
    stream.seed(8)
    assert not np.array_equal(drawn(stream, draw)[0], first)
    stream.seed(7)

    def call():
        with stream.call():
            return draw()

    np.testing.assert_array_equal(tf.function(call)(), first)
    compiled = tf.function(call, jit_compile=True)
    found = compiled().numpy()
    np.testing.assert_array_equal(compiled(), found)
    stream.seed(8)
    assert not np.array_equal(compiled(), found)  # the key is no constant of it
    for x in (first, found):
        assert abs(x.mean() - MEANS[name]) < 5 * x.std() / 20
        assert x.std() == pytest.approx(first.std(), rel=0.3)


def test_outside_of_a_stream_all_is_as_it_was(stream) -> None:
    tf.random.set_seed(1)
    before = tf.random.normal([3])
    drawn(stream, DRAWS["normal"])
    tf.random.set_seed(1)
    np.testing.assert_array_equal(tf.random.normal([3]), before)


def test_what_has_a_seed_of_its_own_or_is_traced_apart_is_left_alone(stream) -> None:
    def in_a_loop():
        return tf.map_fn(lambda _: tf.random.normal([]), tf.zeros(3))

    @tf.function
    def apart():
        return tf.random.normal([])

    drawn(stream, lambda: tf.random.normal([3], seed=5))
    drawn(stream, apart)
    assert stream.taken == 0

    @tf.function
    def traced():
        with stream.call():
            return in_a_loop()

    assert len(set(traced().numpy())) == 3
    assert stream.taken == 0


def test_constants_stand_for_draws(stream) -> None:
    with streams.constant():
        np.testing.assert_allclose(drawn(stream, DRAWS["normal"])[0], 2.0)
        np.testing.assert_allclose(drawn(stream, DRAWS["whole numbers"])[0], 2)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_rows_have_draws_of_their_own(stream, jit_compile: bool) -> None:
    def looped(z):
        with stream.call():
            found = []
            for row in tf.unstack(z):
                found.append(row * tf.random.normal([2]) + tf.random.uniform([]))
            return tf.stack(found)

    z = tf.ones((300, 2))
    function = tf.function(rows.by_rows(looped, (True,), {}), jit_compile=jit_compile)
    found = function(z).numpy()
    assert len(np.unique(found)) == 600
    np.testing.assert_allclose(found.mean(0), 0.5, atol=0.35)
    normal = found[:, 0] - found[:, 1]  # without what both of a row have in common
    np.testing.assert_allclose(normal.std(), np.sqrt(2), atol=0.25)
    with streams.constant():
        np.testing.assert_allclose(
            tf.function(rows.by_rows(looped, (True,), {}))(z), looped(z), rtol=1e-6
        )


def test_a_row_whose_draws_are_of_unknown_shape_is_not_vectorised(stream) -> None:
    def looped(z):
        with stream.call():
            counts = [tf.cast(row[:1], tf.int32) for row in tf.unstack(z)]
            return tf.stack([tf.reduce_sum(tf.random.normal(count)) for count in counts])

    function = tf.function(rows.by_rows(looped, (True,), {}))
    with pytest.raises(UntraceableError, match="shape that is not known"):
        function(tf.ones((3, 2)))
