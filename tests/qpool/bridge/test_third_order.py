"""The third derivative in place: of a function whose derivatives are known."""

import numpy as np
import pytest
import tensorflow as tf

from qpool.bridge import third_order
from workers.errors import SecondOrderGradientError

X, W = np.array([[0.3], [-0.8]]), 0.7


def pulled_back(w: tf.Variable, x: tf.Tensor, expected) -> list:
    """Of u = w x^3: the vjp of the vjp for v = 1 and the tangent (1, 0), for x, w and v."""
    one = tf.ones_like(x)
    given = [one, tf.zeros_like(w.value()), tf.zeros_like(x)]
    return third_order.pulled_back(
        lambda: w * x**3,
        [x, w],
        [one],
        [tf.ones_like(x), tf.zeros_like(w.value())],
        given,
        expected,
    )


def test_of_a_cubic_it_is_constant() -> None:
    w, x = tf.Variable(W, dtype=tf.float64), tf.constant(X)
    second = [6 * w * x, tf.reduce_sum(3 * x**2), 3 * w * x**2]
    for_x, for_w, for_v, *_ = pulled_back(w, x, second)
    np.testing.assert_allclose(for_x, np.full((2, 1), 6 * W))
    np.testing.assert_allclose(for_w, 6 * X.sum())
    np.testing.assert_allclose(for_v, 6 * W * X)


def test_what_workers_found_otherwise_is_refused() -> None:
    w, x = tf.Variable(W, dtype=tf.float64), tf.constant(X)
    with pytest.raises(SecondOrderGradientError, match="attribute of the model"):
        pulled_back(w, x, [7 * w * x, tf.reduce_sum(3 * x**2), 3 * w * x**2])


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_weights_are_compared_bit_by_bit(value: float) -> None:
    w = tf.Variable([value, 2.0])
    third_order.check_weights([w.numpy()], [w])
    with pytest.raises(SecondOrderGradientError, match="weights had changed"):
        third_order.check_weights([w.numpy() + np.float32([0, 1e-6])], [w])
