"""What is compiled is used only if it gives what it gave eagerly."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import record

from workers.compiling import compiled
from workers.compiling.compiled import choose

X = tf.constant(np.random.default_rng(0).normal(size=(4, 4096)).astype("float32"))


def lost(x):
    """A probability that is lost, 1 minus the sum of all others: of 1e-4 three digits are known."""
    return 1.0 - tf.reduce_sum(tf.nn.softmax(x) * (1 - 1e-4), axis=1)


def drifting(x):
    """``lost``, but for what a graph's sum in another order would make of it."""
    return lost(x) + (0.0 if tf.executing_eagerly() else 3e-7)


def otherwise(x):
    return lost(x) * (1.0 if tf.executing_eagerly() else 1.1)


def chosen(function):
    return choose(function, [X], [function(X)], lambda *_: None)


@pytest.mark.parametrize("function", [lost, drifting])
def test_what_cancels_need_not_be_the_same_in_digits_that_are_not_known(function) -> None:
    assert chosen(function).level == "xla"


def test_what_goes_on_from_the_call_before_is_not_used() -> None:
    kept = [1.0]

    def going_on(x):
        found = lost(x) * kept[0]
        kept[0] += 1.0
        return found

    assert chosen(going_on).level == "eager"


def test_what_is_another_number_is_not_used() -> None:
    choice = chosen(otherwise)
    assert choice.level == "eager"
    assert choice.reason == "xla, graph: output 0 differs from the eager one"


@pytest.mark.parametrize("level", ["xla", "graph"])
def test_a_tape_within_listens_where_others_are_stopped(level: str) -> None:
    def slope(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            cube = x**3
        return tape.gradient(cube, x)

    call, x = compiled.at_level(slope, level), tf.constant(2.0)
    with record.stop_recording():
        assert call(x) == 12.0
