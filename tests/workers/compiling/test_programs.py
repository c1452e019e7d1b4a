"""Programs that are compiled once: what is equal, what is not, and what is left of them."""

from __future__ import annotations

import collections
import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

from workers.compiling import compile_cache, compiled, programs
from workers.custom_gradient import custom_gradient


@pytest.fixture(autouse=True)
def found(tmp_path, monkeypatch) -> dict:
    """The programs that are known, none of them at first; names are such as last."""
    monkeypatch.setattr(compile_cache, "in_use", lambda: tmp_path)
    known: dict = programs._known.copy()
    programs.forget()
    yield programs._known
    programs.forget()
    programs._known.update(known)


def made(value: float, factor: float = 2.0) -> tuple[Callable, tf.Variable]:
    weight = tf.Variable([value, value + 1])

    def call(x: tf.Tensor) -> tf.Tensor:
        more = tf.function(lambda y: y + tf.sin(weight * x))  # a function that the program calls
        total = more(more(more(tf.zeros([2]))))
        return tf.reduce_sum(total * weight * factor)

    return compiled.at_level(call, "xla", f"test {factor}"), weight


def derivatives(call: Callable, weight: tf.Variable, x: tf.Tensor) -> list[tf.Tensor]:
    with tf.GradientTape() as outer:
        with tf.GradientTape() as tape:
            value = call(x)
        slope = tape.gradient(value, weight)
    return [call(x), value, slope, outer.gradient(slope, weight)]


def expected(weight: tf.Variable, x: tf.Tensor, factor: float) -> list[np.ndarray]:
    w, x = weight.numpy(), x.numpy()
    value = 3 * factor * np.sum(w * np.sin(w * x))
    slope = 3 * factor * (np.sin(w * x) + w * x * np.cos(w * x))
    return [value, value, slope, 3 * factor * (2 * x * np.cos(w * x) - w * x**2 * np.sin(w * x))]


def test_an_equal_one_is_known_with_its_gradients_and_has_its_own_variables(found) -> None:
    x = tf.constant([0.3, -0.2])
    counts = []
    for value in (0.4, -0.7):
        call, weight = made(value)
        for ours, theirs in zip(
            derivatives(call, weight, x), expected(weight, x, 2.0), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        counts.append(len(found))
    assert counts[0] == counts[1] > 2


def test_another_number_is_another_program(found) -> None:
    x = tf.constant([0.3, -0.2])
    for number, factor in enumerate((2.0, 3.0)):
        call, weight = made(0.4, factor)
        np.testing.assert_allclose(call(x), expected(weight, x, factor)[0], rtol=1e-5)
        assert len(found) == number + 1


@pytest.mark.parametrize(
    "within",
    [
        lambda x, n: tf.cond(x[0] > 0, lambda: n * x, lambda: -n * x),
        lambda x, n: tf.while_loop(lambda k, _: k < n, lambda k, y: (k + 1, y + x), (0, x))[1],
        lambda x, n: tf.function(lambda y: n * y)(x),
        lambda x, n: x * np.full(2, n, np.float32),
        lambda x, n: tf.concat([x] * n, 0),
        lambda x, n: tf.cast(n * x, tf.complex64 if n == 2 else tf.complex128),
    ],
    ids=["cond", "loop", "function", "array", "shape", "dtype"],
)
def test_what_differs_inside_is_another_program(found, within) -> None:
    x = tf.constant([0.3, -0.2])
    for number, n in enumerate((2, 3)):
        ours = compiled.at_level(lambda x, n=n: within(x, n), "xla", "inside")(x)
        theirs = within(x, n)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert len(found) == number + 1


def test_what_is_made_of_the_outputs_is_the_callers_own(found) -> None:
    counts = []
    for _ in range(2):
        kind = collections.namedtuple("Kind", "double x")

        def call(x: tf.Tensor, kind: type = kind) -> tuple:
            return kind(2 * x, x)

        given = compiled.at_level(call, "xla")(tf.constant([0.3]))
        assert type(given) is kind
        counts.append(len(found))
    assert counts == [1, 1]


def test_forward_mode_over_an_equal_one() -> None:
    x, direction = tf.constant([0.3, -0.2]), tf.constant([1.0, 0.5])
    for _ in range(2):
        call, weight = made(0.4)
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            value = call(x)
        w = weight.numpy()
        slope = np.sum(6 * w**2 * np.cos(w * x.numpy()) * direction.numpy())
        np.testing.assert_allclose(accumulator.jvp(value), slope, rtol=1e-5)


def test_what_failed_is_not_known_any_more(found) -> None:
    call, _ = made(0.4)
    call(tf.constant([0.3, -0.2]))
    assert found
    programs.forget()
    assert not found


def test_nothing_stays_of_a_trace_with_gradients_of_its_own(found) -> None:
    """TensorFlow's registry of gradients would keep each graph."""

    graphs = []

    def one() -> None:
        @custom_gradient
        def double(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
            return 2 * x, lambda cotangent: 3 * cotangent

        call = compiled.at_level(lambda x: tf.reduce_sum(double(x)), "xla", "double")
        x = tf.constant([0.3, -0.2])
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = call(x)
        np.testing.assert_array_equal(tape.gradient(value, x), [3, 3])

    gc.collect()
    registered = set(ops.gradient_registry.list())
    one()
    gc.collect()
    assert [graph() for graph in graphs] == [None]
    assert set(ops.gradient_registry.list()) <= registered
