"""Which trainable scalars a loss reaches: the gradient that each gets, counted."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class GradientFlow:
    """How many of ``total`` trainable scalars get a gradient that is finite and not zero.

    ``by_variable`` says the same of each variable: name -> (flowing, total); ``not_finite`` counts
    NaN and infinities, ``zero`` exact zeros, scalars that the loss does not depend on among them.
    """

    flowing: int
    total: int
    zero: int
    not_finite: int
    by_variable: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        missing = [f"{n} ({f} of {t})" for n, (f, t) in self.by_variable.items() if f < t]
        tail = f"; short: {', '.join(missing)}" if missing else ""
        return f"{self.flowing} of {self.total} trainable scalars get a gradient{tail}"


def gradient_flow(model: Any, loss: Callable[..., Any]) -> GradientFlow:
    """Measure how many trainable scalars of ``model`` get a finite, non-zero gradient.

    Args:
        model: anything with ``trainable_variables``; pooled or not.
        loss: returns a scalar tensor; called with the model, or without arguments if it takes none.

    Raises:
        InputError: the loss is not a real scalar.
    """
    import numpy as np
    import tensorflow as tf

    from workers.errors import InputError

    variables = list(model.trainable_variables)
    takes_model = len(inspect.signature(loss).parameters) > 0
    with tf.GradientTape() as tape:
        value = loss(model) if takes_model else loss()
    if not tf.is_tensor(value) or value.shape.rank != 0 or not value.dtype.is_floating:
        raise InputError(f"expected a loss that is a real scalar tensor; came {value!r}")
    sources = [v if isinstance(v, tf.Variable) else v.value for v in variables]  # Keras's hold one
    gradients = tape.gradient(value, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    by_variable: dict[str, tuple[int, int]] = {}
    zero = not_finite = 0
    for number, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
        array = np.asarray(tf.convert_to_tensor(gradient))
        finite = np.isfinite(array)
        name = getattr(variable, "name", "") or f"variable {number}"
        if name in by_variable:
            name = f"{name} ({number})"
        by_variable[name] = (int(np.sum(finite & (array != 0))), array.size)
        zero += int(np.sum(array == 0))
        not_finite += int(np.sum(~finite))
    flowing, total = (sum(pair[n] for pair in by_variable.values()) for n in (0, 1))
    return GradientFlow(flowing, total, zero, not_finite, by_variable)


def gradient_norms(model: Any, z: Any, cotangent: Any) -> Any:
    """The norm of each sample's gradient with respect to all trainable variables: (batch,).

    Args:
        model: what ``qpool.parallelize`` made.
        z: (batch, latent_dim), as of its ``per_sample_gradients``.
        cotangent: of the model's outputs, in their shapes.
    """
    import tensorflow as tf

    from qpool.pooled import ParallelGenerator
    from workers.errors import InputError

    if not isinstance(model, ParallelGenerator):
        raise InputError(
            f"gradient_norms needs a model made by qpool.parallelize; came {type(model).__name__}"
        )
    rows = [tf.reshape(g, [len(g), -1]) for g in model.per_sample_gradients(z, cotangent)]
    squares = [tf.reduce_sum(tf.abs(row) ** 2, axis=1) for row in rows]
    return tf.sqrt(tf.add_n([tf.cast(s, squares[0].dtype) for s in squares]))
