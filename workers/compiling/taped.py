"""A function that XLA has compiled, called while a tape listens: its gradient is one program more.

    call        values by the program that there is      variables are noted as they are
    gradient    one program, which makes the forward pass again

TensorFlow would compile two other programs, of which the forward one hands what its gradient needs
to the other, tensor by tensor, through memory. A step of 3 modes, 6 layers, cutoff 12, batch 32
takes 38 and 41 ms this way, 44 that way (two cores of an EPYC, one run), a small circuit as long.

Owns what is recorded, and that a gradient is that of the variables' values at the call. Where a
tape may be asked for more than first derivatives, within a graph, and forwards, TensorFlow's way is
taken, which has derivatives of any order in any of them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record
from tensorflow.python.ops import gradients_util, resource_variable_ops

from workers.compiling.compile_cache import Guarded
from workers.tensors import asked_for, differentiable, leaves
from workers.variables import Reader

#: Of given variables, and outputs (which of them all): (*inputs, *cotangents) -> a gradient, or
#: None, for each input that may have one and then each variable. Cotangents are these outputs'.
PullBack = Callable[[Sequence[tf.Variable], "tuple[bool, ...]"], Guarded]


class Taped:
    """``forward``, with ``pull_back`` for what a tape asks that is for first derivatives alone.

    ``around`` is what both are traced within, and what keeps other calls of the model away. The
    last outputs are ``aside``, so many: a loss is likely to be of others.
    """

    def __init__(
        self,
        forward: Guarded,
        pull_back: PullBack,
        around: Callable[[], AbstractContextManager[Any]],
        aside: int = 0,
    ) -> None:
        self._forward, self._make, self._around = forward, pull_back, around
        self._aside = aside
        self._read: dict[Any, _Read] = {}

    def __call__(self, *inputs: tf.Tensor) -> Any:
        if not (tf.executing_eagerly() and record.could_possibly_record()):
            return self._forward(*inputs)
        read = self._read_by(inputs)
        sources = [*itertools.compress(inputs, read.of_inputs), *read.handles]
        if not asked_once(sources, read.trainable):
            return self._forward(*inputs)
        with record.stop_recording():
            found = self._forward(*inputs)
            values = read.values()
        outputs = [found] if isinstance(found, tf.Tensor) else leaves(found)
        if read.of_outputs is None:
            read.of_outputs = tuple(map(differentiable, outputs))
            likely = read.of_outputs[: len(outputs) - self._aside]
            likely += (False,) * self._aside
            with self._around():  # traced now, while the model is what the call found it to be
                self._pull_back(read, likely).made.variables(
                    *inputs, *itertools.compress(outputs, likely)
                )
        of_outputs = read.of_outputs
        kinds = [(x.shape, x.dtype) for x in outputs]

        def gradient(*cotangents: Any) -> list[tf.Tensor | None]:
            asked = of_outputs
            if tf.executing_eagerly() and len(outputs) > 1:
                asked = tuple(map(operator.and_, of_outputs, asked_for(cotangents)))
                asked = asked if any(asked) else of_outputs
            seeds = [
                _like(x, kind)
                for flag, x, kind in zip(asked, cotangents, kinds, strict=True)
                if flag
            ]
            if tf.executing_eagerly():
                return self._pulled_back(read, asked, values, inputs, seeds)
            with self._around():
                return self._in_graph(read, _of_then(read, values), inputs, seeds)

        record.record_operation("Taped", outputs, sources, gradient)
        return found

    def _pull_back(self, read: _Read, asked: tuple[bool, ...]) -> Guarded:
        """Of the outputs that are asked for: what another one depends on has no gradient."""
        if asked not in read.pull_backs:
            read.pull_backs[asked] = self._make(list(filter(differentiable, read.variables)), asked)
        return read.pull_backs[asked]

    def _pulled_back(
        self,
        read: _Read,
        asked: tuple[bool, ...],
        values: Sequence[tf.Tensor],
        inputs: Sequence[tf.Tensor],
        cotangents: Sequence[tf.Tensor],
    ) -> list[tf.Tensor | None]:
        """Tapes that listen by now are told of the cotangents: the call is none of theirs."""

        def call(cotangents: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
            tensors = [*inputs, *cotangents]
            with self._around():
                others = _of_then(read, values)
                pull_back = self._pull_back(read, asked)
                found: list[tf.Tensor | None] = (
                    pull_back.made.with_captures(others, tensors) if others else pull_back(*tensors)
                )
            return found

        def further(*tangents: tf.Tensor) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(cotangents)
                found = [x for x in call(cotangents) if x is not None]
            return tape.gradient(found, cotangents, output_gradients=tangents)

        with record.stop_recording():
            gradients = call(cotangents)
        there = [x for x in gradients if x is not None]
        record.record_operation("TapedGradient", there, cotangents, further)
        return gradients

    def _in_graph(
        self,
        read: _Read,
        others: Mapping[int, tf.Variable],
        inputs: Sequence[tf.Tensor],
        cotangents: Sequence[tf.Tensor],
    ) -> list[tf.Tensor | None]:
        """By TensorFlow's two programs, whose derivatives in graphs are its own."""
        variables = [others.get(id(v.handle), v) for v in read.variables if differentiable(v)]
        sources = [*itertools.compress(inputs, read.of_inputs), *variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            found = self._forward.made.with_captures(others, inputs)
        outputs = [output for output in leaves(found) if differentiable(output)]
        gradients: list[tf.Tensor | None] = tape.gradient(
            outputs, sources, output_gradients=cotangents
        )
        return gradients

    def _read_by(self, inputs: Sequence[tf.Tensor]) -> _Read:
        key = tuple((*x.shape, x.dtype) for x in inputs)
        if key not in self._read:
            variables = self._forward.made.variables(*inputs)
            floating = list(filter(differentiable, variables))
            self._read[key] = _Read(
                variables,
                Reader(variables),
                [variable for variable in variables if variable.trainable],
                [differentiable(x) for x in inputs],
                [variable.handle for variable in floating],
            )
        return self._read[key]


def asked_once(sources: Sequence[tf.Tensor], trainable: Sequence[tf.Variable]) -> bool:
    """Whether one tape listens, for first derivatives alone: none that is persistent or around
    another one, and no accumulator. These are told which variables are read."""
    for variable in trainable:
        resource_variable_ops.variable_accessed(variable)
    possible = gradients_util.PossibleTapeGradientTypes(sources)
    first_order = possible == gradients_util.POSSIBLE_GRADIENT_TYPES_FIRST_ORDER
    return first_order and not forwardprop_util.pack_tangents(sources).tangents


@dataclass
class _Read:
    """What a call reads: ``variables`` and the ``values`` that they have now, those of them that
    are ``trainable``, and ``handles`` of those that may have gradients. ``pull_backs`` give these,
    of outputs that are asked for; ``of_inputs`` and ``of_outputs`` say which ones may have any, if
    that is known."""

    variables: Sequence[tf.Variable]
    values: Callable[[], list[tf.Tensor]]
    trainable: Sequence[tf.Variable]
    of_inputs: Sequence[bool]
    handles: Sequence[tf.Tensor]
    pull_backs: dict[tuple[bool, ...], Guarded] = field(default_factory=dict)
    of_outputs: tuple[bool, ...] | None = None


def _of_then(read: _Read, values: Sequence[tf.Tensor]) -> dict[int, tf.Variable]:
    """For variables that have others than the ``values`` of the call by now, by the ``id`` of their
    handles: ones that have those. The model's own are left alone, for whoever else reads them."""
    with record.stop_recording(), tf.init_scope():
        now = read.values()
        of_all = zip(read.variables, values, now, strict=True)
        others = [(variable, then) for variable, then, new in of_all if not _same(then, new)]
        made = resource_variable_ops.ResourceVariable  # tf.function makes no tf.Variable here
        of_then = {id(variable.handle): made(then, trainable=False) for variable, then in others}
    if others and not tf.executing_eagerly():
        graph = tf.compat.v1.get_default_graph()
        kept = getattr(graph, "_kept_by_taped", ())
        graph._kept_by_taped = (*kept, of_then)  # as long as it may be run
    return of_then


def _like(cotangent: Any, kind: tuple[tf.TensorShape, tf.DType]) -> tf.Tensor:
    """A cotangent as the program takes it: the output's shape and dtype, or an error."""
    shape, dtype = kind
    cotangent = tf.convert_to_tensor(cotangent, dtype)
    return cotangent if cotangent.shape == shape else tf.broadcast_to(cotangent, shape)


def _same(a: tf.Tensor, b: tf.Tensor) -> bool:
    """To the bit. What is noted is not written over, so that the same memory has the same bits."""
    first, second = np.asarray(a), np.asarray(b)
    same_memory = first.__array_interface__["data"] == second.__array_interface__["data"]
    return same_memory or first.tobytes() == second.tobytes()
