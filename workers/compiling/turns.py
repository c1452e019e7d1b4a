"""A call that runs circuits for one row after another, as a loop of the graph's.

For rows whose own numbers decide what is computed of them (see ``branches``): they are not the same
operations, so that no row stands for all. Each turn goes its own way, forward and back; what is not
taken has no gradient, not even one that is no number. Owns the loop and its pull-back, which makes
each row again: what a loop keeps for its gradient cannot leave a program of XLA's.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import map_fn

from workers.compiling import branches, streams
from workers.custom_gradient import custom_gradient
from workers.tensors import differentiable, for_xla, leaves, mapped, within_xla


def in_turn(
    call: Callable[..., Any],
    inputs: Sequence[tf.Tensor],
    over: tuple[bool, ...],
    rows: int,
    outputs: Any,
) -> Any:
    """What ``call`` gives for all rows, called with one at a time.

    Args:
        call: of tensors of one row.
        inputs: tensors of a graph, those that ``over`` says (rows, ...).
        over: which of the inputs have rows.
        rows: how many there are.
        outputs: a spec of a row of each output, in the outputs' structure.
    """
    specs = [tf.TensorSpec([1, *x.shape], x.dtype) for x in leaves(outputs)]
    found = iter(_Turns.of(lambda *row: leaves(call(*row)), over, rows)(inputs, specs))
    return mapped(lambda _: next(found)[:, 0], outputs)


@dataclasses.dataclass(frozen=True)
class _Turns:
    """The loop over a call's rows. ``call`` gives a list of tensors.

    Attributes:
        around: what was around the call, for a backward pass is traced later.
        drawn: how many draws there had been.
    """

    call: Callable[..., list[tf.Tensor]]
    over: tuple[bool, ...]
    rows: int
    around: contextvars.Context
    within: Callable[[], AbstractContextManager[Any]]
    drawn: int

    @staticmethod
    def of(call: Callable[..., list[tf.Tensor]], over: tuple[bool, ...], rows: int) -> _Turns:
        within = for_xla if within_xla() else contextlib.nullcontext
        return _Turns(call, over, rows, contextvars.copy_context(), within, streams.position())

    def __call__(
        self, inputs: Sequence[tf.Tensor], specs: Sequence[tf.TensorSpec]
    ) -> list[tf.Tensor]:
        """What the calls gave, (rows, ...). ``specs`` are those of one call's."""

        @custom_gradient
        def forward(*inputs: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
            def pull_back(*cotangents: tf.Tensor, variables: Sequence[Any] = ()) -> Any:
                return self._pulled_back(inputs, cotangents, list(variables))

            return self._each(inputs, specs), pull_back

        # They may be another graph's, to which a further backward pass has no access.
        found: list[tf.Tensor] = forward(*map(tf.identity, inputs))
        return found

    def _pulled_back(
        self,
        inputs: Sequence[tf.Tensor],
        cotangents: Sequence[tf.Tensor],
        variables: list[Any],
    ) -> tuple[list[tf.Tensor | None], list[tf.Tensor | None]]:
        """Gradients for the inputs and the variables; None for what no way depends on."""
        sources = [n for n, x in enumerate(inputs) if differentiable(x)]
        connected: set[int] = set()

        def vjp(*given: tf.Tensor) -> list[tf.Tensor]:
            row, seeds = given[: len(inputs)], [x[0] for x in given[len(inputs) :]]
            with tf.GradientTape() as tape:
                tape.watch([row[n] for n in sources])
                found = [x for x in self.call(*row) if differentiable(x)]
            of = [*(row[n] for n in sources), *variables]
            gradients = tape.gradient(found, of, output_gradients=[*filter(differentiable, seeds)])
            connected.update(n for n, x in enumerate(gradients) if x is not None)
            return [
                tf.zeros_like(x) if gradient is None else tf.convert_to_tensor(gradient)
                for x, gradient in zip(of, gradients, strict=True)
            ]

        specs = [
            tf.TensorSpec([1, *x.shape[1:]] if has_rows else x.shape, x.dtype)
            for x, has_rows in zip(inputs, self.over, strict=True)
            if differentiable(x)
        ]
        specs += [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        over = (*self.over, *[True] * len(cotangents))
        found = dataclasses.replace(self, call=vjp, over=over)([*inputs, *cotangents], specs)
        of_inputs: list[tf.Tensor | None] = [None] * len(inputs)
        for place, n in enumerate(sources):
            if place in connected:
                own = found[place]
                of_inputs[n] = own[:, 0] if self.over[n] else tf.reduce_sum(own, axis=0)
        of_variables = [
            tf.reduce_sum(found[n], axis=0) if n in connected else None
            for n in range(len(sources), len(found))
        ]
        return of_inputs, of_variables

    def _each(self, inputs: Sequence[tf.Tensor], specs: Sequence[tf.TensorSpec]) -> list[tf.Tensor]:
        @tf.autograph.experimental.do_not_convert
        def one(index: tf.Tensor) -> list[tf.Tensor]:
            def draw(shape: list[int], dtype: Any, made: Callable[..., tf.Tensor]) -> tf.Tensor:
                return tf.gather(made([self.rows, *shape]), index)

            row = [
                tf.gather(x, index)[None] if has_rows else x
                for x, has_rows in zip(inputs, self.over, strict=True)
            ]
            with streams.of_rows(draw, nested_from=self.drawn):
                found: list[tf.Tensor] = branches.followed(self.call)(*row)
            return found

        loop = self.around.copy().run
        with self.within(), branches.recording(False):
            found: list[tf.Tensor] = loop(
                map_fn.map_fn, one, tf.range(self.rows), fn_output_signature=list(specs)
            )
        return found
