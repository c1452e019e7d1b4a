"""Assignments that are held back are results, and nothing else changes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from workers.compiling import updates
from workers.errors import UntraceableError


def counting(variable):
    def call(x):
        variable.assign_add([1.0])
        variable.assign(2.0 * variable)
        variable.assign_sub([0.5])
        return x + variable

    return call


@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "graph", "xla"])
def test_what_would_be_assigned_is_read_and_returned(compiled) -> None:
    variable = tf.Variable([1.0], trainable=False)
    other = tf.Variable(0.0)

    def both(x):
        with updates.held_back([variable]) as values:
            found = counting(variable)(x)
            return found, values()

    call = both if compiled is None else tf.function(both, jit_compile=compiled)
    found, (value,) = call(tf.constant([3.0]))
    np.testing.assert_array_equal(found, [6.5])
    np.testing.assert_array_equal(value, [3.5])
    np.testing.assert_array_equal(variable, [1.0])
    with updates.noticing() as noticed:
        other.assign(1.0)
        assert float(counting(variable)(3.0)[0]) == 6.5
    assert set(noticed) == {id(variable), id(other)}
    np.testing.assert_array_equal(variable, [3.5])


def test_no_gradient_goes_through_an_assignment() -> None:
    variable, x = tf.Variable(1.0, trainable=False), tf.Variable(2.0)
    with tf.GradientTape() as tape, updates.held_back([variable]):
        variable.assign(3.0 * x)
        found = variable * x
    assert float(found) == 12.0
    assert float(tape.gradient(found, x)) == 6.0


def test_a_value_of_another_shape_is_refused_as_before() -> None:
    variable = tf.Variable([1.0, 2.0], trainable=False)
    with updates.held_back([variable]), pytest.raises(ValueError, match="incompatible"):
        variable.assign(tf.zeros(3))


def test_what_a_function_of_its_own_traces_is_left_alone() -> None:
    """It keeps what it has traced, for calls in which nothing is held back."""
    variable = tf.Variable(1.0, trainable=False)
    inner = tf.function(lambda x: variable.assign_add(x))
    reads = tf.function(lambda x: variable * x)

    @tf.function
    def outer(x):
        with updates.held_back([variable]) as values:
            inner(x)
            return values()

    outer(tf.constant(2.0))
    assert float(variable) == 3.0

    @tf.function
    def updating(x):
        with updates.held_back([variable]):
            variable.assign(x)
            return reads(x)

    with pytest.raises(UntraceableError, match=r"a tf\.function of its own"):
        updating(tf.constant(2.0))
    assert float(reads(tf.constant(2.0))) == 6.0


def test_layers_of_keras_have_theirs_held_back() -> None:
    layer = keras.layers.BatchNormalization()
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 2)).astype("float32"))
    layer(x)
    before = [np.asarray(v) for v in layer.non_trainable_variables]
    with updates.held_back([v.value for v in layer.non_trainable_variables]) as values:
        layer(x, training=True)
        held = values()
    for variable, value in zip(layer.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    layer(x, training=True)
    for variable, value in zip(layer.non_trainable_variables, held, strict=True):
        np.testing.assert_array_equal(variable, value)
