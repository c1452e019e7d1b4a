"""A method called with one tile's rows, and pulled back, at whatever level it is compiled to.

Owns the TensorFlow side of a tile: what is called, with which tensors, in one program or on a tape;
and that none of it changes a variable. Knows nothing of tiles' places or of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.layout import Buffer
from workers.replica.method import Method, as_tensors, as_the_model_wants
from workers.replica.recorded import Recorded, by_source
from workers.replica.weights import Weights
from workers.tensors import differentiable


class Calls:
    """Calls of one model, whose ``weights`` hold the ``variables`` that gradients are for.

    ``buffer`` is the arena's, in which the variables' values are looked up after each call.
    """

    def __init__(self, weights: Weights, variables: Sequence[tf.Variable]) -> None:
        self._weights = weights
        self._variables = variables

    def check_all_unchanged(self, buffer: Buffer) -> None:
        """Raise if a call has changed any variable, of those too that no gradient is for."""
        self._weights.check_unchanged(buffer, all_of_them=True)

    def run(self, method: Method, arrays: list[np.ndarray], buffer: Buffer) -> Any:
        inputs = as_the_model_wants(method.plan, arrays)
        if method.plan.level != "eager":
            inputs = as_tensors(inputs)
        outputs = method.compiled(*inputs)
        self._weights.check_unchanged(buffer)
        return outputs

    def record(self, method: Method, arrays: list[np.ndarray], buffer: Buffer) -> Recorded:
        recorded = Recorded.of(method, as_the_model_wants(method.plan, arrays), self._variables)
        self._weights.check_unchanged(buffer)
        return recorded

    def vjp(
        self,
        method: Method,
        arrays: list[np.ndarray],
        seeds: list[tf.Tensor],
        buffer: Buffer,
    ) -> list[Any]:
        """As ``Recorded.gradients``, by one compiled function that makes the forward pass again.

        A tape over a compiled function costs more: the forward pass's many tensors go through
        Python (2 ms for a small circuit's 250) and out of the cache (64 ms a step, 60 this way).
        ``seeds`` are the cotangents of the real and complex outputs.
        """
        inputs = as_the_model_wants(method.plan, arrays)
        found = method.compiled_vjp(*as_tensors(inputs), *seeds)
        self._weights.check_unchanged(buffer)
        return by_source(found, inputs)

    def both(
        self,
        method: Method,
        arrays: list[np.ndarray],
        given: tuple[int, ...],
        seeds: list[tf.Tensor],
        wanted: tuple[int, ...],
        buffer: Buffer,
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Outputs, and gradients for the ``wanted`` variables, of outputs ``given`` cotangents."""
        inputs = as_the_model_wants(method.plan, arrays)
        if method.plan.level != "eager":
            inputs = as_tensors(inputs)
        found = method.compiled_both_of(given, wanted)(*inputs, *seeds)
        self._weights.check_unchanged(buffer)
        return found[: len(found) - len(wanted)], found[len(found) - len(wanted) :]

    def second(
        self,
        method: Method,
        arrays: list[np.ndarray],
        seeds: list[tf.Tensor],
        tangents: list[tf.Tensor | None],
        buffer: Buffer,
    ) -> tuple[list[Any], list[Any]]:
        """What ``vjp`` gives, pulled back: gradients by source, and those of all outputs' seeds.

        None for a source that nothing depends on: one that the gradient is linear in, say.
        """
        inputs = as_the_model_wants(method.plan, arrays)
        sources = sum(map(differentiable, inputs)) + len(self._variables)
        places = tuple(n for n, tangent in enumerate(tangents) if tangent is not None)
        given = [tangents[n] for n in places]
        found = method.compiled_second(places)(*as_tensors(inputs), *seeds, *given)
        self._weights.check_unchanged(buffer)
        of_seeds = iter(
            tf.zeros_like(x) if gradient is None else tf.convert_to_tensor(gradient)
            for x, gradient in zip(seeds, found[sources:], strict=True)
        )
        floating = [spec.is_float for spec in method.plan.outputs]
        of_cotangents = [next(of_seeds).numpy() if there else None for there in floating]
        return by_source(found[:sources], inputs), of_cotangents
