"""A model's method with weights among its arguments: what a worker has in their places.

Owns what stands for them in a call. Knows nothing of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from workers.exchange.protocol import Standin, filled


@dataclass(frozen=True)
class Given(Standin):
    """Stands in the arguments of a call for the n-th weight that it is given."""


@dataclass(frozen=True)
class Weight:
    """What is known of one before a call: ``as_variable``, whether the model is given a variable,
    else a tensor."""

    shape: tuple[int, ...]
    dtype: str
    as_variable: bool


class WithWeights:
    """Called as the model's ``method`` is, with a ``Given`` in the place of each weight.

    The weights are variables of this model, beside those that the other one has; their values are
    those that a call brings with it.
    """

    def __init__(self, model: Any, method: str, weights: Sequence[Weight]) -> None:
        self.model = model
        self.weights = [tf.Variable(tf.zeros(w.shape, w.dtype)) for w in weights]
        self._as_variables = [w.as_variable for w in weights]
        self.method = method

    @property
    def call(self) -> Callable[..., Any]:
        """What says which arguments there are."""
        inner = "call" if self.method == "__call__" and hasattr(self.model, "call") else ""
        found: Callable[..., Any] = getattr(self.model, inner or self.method)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [
            weight if as_variable else tf.convert_to_tensor(weight)
            for weight, as_variable in zip(self.weights, self._as_variables, strict=True)
        ]
        args, kwargs = filled((args, kwargs), given, Given)
        call = self.model if self.method == "__call__" else getattr(self.model, self.method)
        return call(*args, **kwargs)
