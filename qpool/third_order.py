"""The third derivative of a pooled call, which workers do not hand back: computed in this process.

A differential equation's residual that is trained through has one (u_xx, pulled back to the
weights). Owns the tapes around the call in place. What it gives is differentiated no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.errors import SecondOrderGradientError
from workers.tensors import leaves


def pulled_back(
    call: Callable[[], Any],
    sources: Sequence[Any],
    cotangents: Sequence[Any],
    tangents: Sequence[Any],
    given: Sequence[Any],
) -> list[Any]:
    """The gradient of the second derivative.

    Args:
        call: the model's call in place, of the tensors and variables in ``sources``.
        sources: what the vjp is for: inputs and variables.
        cotangents: of the call's real and complex outputs.
        tangents: cotangents of the vjp's results, one for each source.
        given: cotangents of what that gives: for each source and each of ``cotangents``.

    Returns:
        Gradients for sources, cotangents and tangents; zeros where nothing depends on one.
    """
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape() as third:
        third.watch([*sources, *cotangents, *tangents])
        with tf.GradientTape() as second:
            second.watch([*sources, *cotangents])
            with tf.GradientTape() as first:
                first.watch(sources)
                outputs = [x for x in leaves(call()) if x.dtype.is_floating or x.dtype.is_complex]
            slopes = first.gradient(
                outputs, sources, output_gradients=cotangents, unconnected_gradients=zero
            )
        found = second.gradient(
            slopes, [*sources, *cotangents], output_gradients=tangents, unconnected_gradients=zero
        )
    gradients: list[Any] = third.gradient(
        found,
        [*sources, *cotangents, *tangents],
        output_gradients=given,
        unconnected_gradients=zero,
    )
    return gradients


def check_weights(told: Sequence[Any], variables: Sequence[tf.Variable]) -> None:
    """SecondOrderGradientError unless the variables are what the call was made with: in place, it
    would be of what they are now."""
    why = (
        "a third derivative was asked of the pool after the weights had changed: it is computed in "
        "place, with the weights as they are now. Take all gradients of a step before updating"
    )
    if tf.executing_eagerly():
        pairs = zip(told, variables, strict=True)
        if not all(np.array_equal(value, variable.numpy()) for value, variable in pairs):
            raise SecondOrderGradientError(why)
        return
    same = [tf.reduce_all(value == v) for value, v in zip(told, variables, strict=True)]
    tf.debugging.Assert(tf.reduce_all(same), [why])
