"""A tile's eager forward pass on its tape, and its way back.

Owns what is kept of a call that is not compiled, until its cotangents come.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from workers.replica.method import Method
from workers.tensors import differentiable, leaves, tensor_of


@dataclass(frozen=True)
class Recorded:
    """Outputs on their tape, the tensors they were computed from, and the model's variables."""

    tape: tf.GradientTape
    inputs: list[Any]
    outputs: list[Any]
    sources: Sequence[tf.Variable]

    @classmethod
    def of(cls, method: Method, inputs: list[Any], sources: Sequence[tf.Variable]) -> Recorded:
        """Call the method; every input that can have a gradient, and every source, is watched."""
        with tf.GradientTape() as tape:
            tape.watch([x for x in inputs if differentiable(x)])
            tape.watch(sources)
            outputs = leaves(method.compiled(*inputs))
        return cls(tape, inputs, outputs, sources)

    def gradients(
        self,
        cotangents: list[Any] | None,
        wanted: Collection[int] | None = None,
        *,
        last: bool = False,
    ) -> list[Any]:
        """Gradients for each input (that is ``wanted``; None: all), then each variable; None where
        nothing depends. Without ``cotangents``, those of the outputs' sum, or of the ``last``
        one's."""
        targets, seeds = [], []
        for position, output in enumerate(self.outputs):
            if not differentiable(output) or (last and position < len(self.outputs) - 1):
                continue
            given = output if cotangents is None else cotangents[position]
            if given is None:
                continue
            targets.append(output)
            seeds.append(tf.ones_like(output) if cotangents is None else tensor_of(given))
        # For those that no gradient is wanted for, zeros, which nothing depends on.
        unasked = {n for n in range(len(self.inputs)) if wanted is not None and n not in wanted}
        watched = [
            tf.zeros_like(x) if n in unasked else x
            for n, x in enumerate(self.inputs)
            if differentiable(x)
        ]
        if not targets:
            return [None] * (len(self.inputs) + len(self.sources))
        found = self.tape.gradient(targets, [*watched, *self.sources], output_gradients=seeds)
        return by_source(found, self.inputs)


def by_source(found: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Gradients for each input, then each variable, from those of the differentiable ones."""
    dense = iter([None if g is None else tf.convert_to_tensor(g) for g in found])
    of_inputs = [next(dense) if differentiable(x) else None for x in inputs]
    return [*of_inputs, *dense]
