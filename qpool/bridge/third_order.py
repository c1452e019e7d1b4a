"""The third derivative of a pooled call, which workers do not hand back: computed in this process.

A differential equation's residual that is trained through has one (u_xx, pulled back to the
weights). Owns the tapes around the call in place. What it gives is differentiated no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from workers.errors import SecondOrderGradientError
from workers.tensors import differentiable

#: By how much the second derivative may differ here, of its largest entry: rounding is far less.
_TOLERANCE = 0.01


def pulled_back(
    call: Callable[[], Any],
    sources: Sequence[Any],
    cotangents: Sequence[Any],
    tangents: Sequence[Any],
    given: Sequence[Any],
    expected: Sequence[Any],
) -> list[Any]:
    """The gradient of the second derivative.

    Args:
        call: the model's call in place, of the tensors and variables in ``sources``.
        sources: what the vjp is for: inputs and variables.
        cotangents: of the call's real and complex outputs.
        tangents: cotangents of the vjp's results, one for each source.
        given: cotangents of what that gives: for each source and each of ``cotangents``.
        expected: what workers found that to be.

    Returns:
        Gradients for sources, cotangents and tangents; zeros where nothing depends on one.

    Raises:
        SecondOrderGradientError: here the second derivative is another one.
    """
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape() as third:
        third.watch([*sources, *cotangents, *tangents])
        with tf.GradientTape() as second:
            second.watch([*sources, *cotangents])
            with tf.GradientTape() as first:
                first.watch(sources)
                outputs = [x for x in tf.nest.flatten(call()) if differentiable(x)]
            slopes = first.gradient(
                outputs, sources, output_gradients=cotangents, unconnected_gradients=zero
            )
        found = second.gradient(
            slopes, [*sources, *cotangents], output_gradients=tangents, unconnected_gradients=zero
        )
    _check(
        [_close(a, b) for a, b in zip(found, expected, strict=True)],
        "a third derivative was asked of the pool. It is computed in place, where the second one "
        "is another than the workers': an attribute of the model was changed since parallelize, "
        "which workers do not see (parallelize the model again), or this is forward mode "
        "(tf.autodiff.ForwardAccumulator) over a tape, in which tapes here record nothing",
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
    _check(
        [_same_bits(value, v) for value, v in zip(told, variables, strict=True)],
        "a third derivative was asked of the pool after the weights had changed: it is computed in "
        "place, with the weights as they are now. Take all gradients of a step before updating",
    )


def _check(holds: Sequence[Any], why: str) -> None:
    if not tf.executing_eagerly():
        tf.debugging.Assert(tf.reduce_all(holds), [why])
    elif not all(map(bool, holds)):
        raise SecondOrderGradientError(why)


def _same_bits(value: Any, variable: tf.Variable) -> Any:
    value, now = tf.convert_to_tensor(value), variable.value()
    return tf.reduce_all((value == now) | ((value != value) & (now != now)))


def _close(a: Any, b: Any) -> Any:
    """Whether it could be the same but for rounding; anything is close to what is no number."""
    size = tf.maximum(tf.reduce_max(tf.abs(b)), 1e-3) if b.shape.num_elements() != 0 else 1.0
    return tf.logical_not(tf.reduce_any(tf.abs(a - b) > _TOLERANCE * size))
