"""A function that XLA has compiled, called while a tape listens: its gradient is one program more.

    call        values by the program that there is      variables are noted as they are
    gradient    one program, which makes the forward pass again

TensorFlow would compile two other programs, of which the forward one hands what its gradient needs
to the other, tensor by tensor, through memory. On one core (3 modes, 6 layers, cutoff 12, batch 32)
a call and its gradient take 34 ms this way, 44 that way; a small circuit's (2, 2, 8) 1.2 and 2.1.

Owns what is recorded, and that a gradient is that of the variables' values at the call. Within a
graph, and for forward-mode derivatives, TensorFlow's way is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record
from tensorflow.python.ops import resource_variable_ops

from workers.compiling.compile_cache import Guarded
from workers.errors import SecondOrderGradientError
from workers.tensors import differentiable, leaves
from workers.variables import Reader

#: Of given variables: (*inputs, *cotangents) -> a gradient, or None, for each input that may have
#: one and then each variable. Cotangents are those of outputs that are differentiable.
PullBack = Callable[[Sequence[tf.Variable]], Guarded]


class Taped:
    """``forward``, with ``pull_back`` for its gradients, of any order.

    ``around`` is what both are traced within, and what keeps other calls of the model away.
    """

    def __init__(
        self,
        forward: Guarded,
        pull_back: PullBack,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._forward, self._make, self._around = forward, pull_back, around
        self._read: dict[Any, _Read] = {}

    def __call__(self, *inputs: tf.Tensor) -> Any:
        if not (tf.executing_eagerly() and record.could_possibly_record()):
            return self._forward(*inputs)
        read = self._read_by(inputs)
        for variable in read.trainable:
            resource_variable_ops.variable_accessed(variable)
        sources = [*itertools.compress(inputs, read.of_inputs), *read.handles]
        forward_mode = forwardprop_util.pack_tangents(sources).tangents
        if forward_mode or not record.should_record_backprop(sources):
            return self._forward(*inputs)
        with record.stop_recording():
            found = self._forward(*inputs)
            values = read.values()
        outputs = [found] if isinstance(found, tf.Tensor) else leaves(found)
        if read.of_outputs is None:
            read.of_outputs = [differentiable(output) for output in outputs]
            with self._around():  # traced now, while the model is what the call found it to be
                read.pull_back.made.variables(
                    *inputs, *itertools.compress(outputs, read.of_outputs)
                )
        of_outputs = read.of_outputs

        def gradient(*cotangents: Any) -> list[tf.Tensor | None]:
            given = map(tf.convert_to_tensor, itertools.compress(cotangents, of_outputs))
            with self._around():
                return _pulled_back(read, values, [*inputs, *given])

        record.record_operation("Taped", outputs, sources, gradient)
        return found

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
                self._make(floating),
            )
        return self._read[key]


@dataclass
class _Read:
    """What a call reads: ``variables`` and the ``values`` that they have now, those of them that
    are ``trainable``, and ``handles`` of those that may have gradients. ``pull_back`` gives these;
    ``of_inputs`` and ``of_outputs`` say which ones may have any, if that is known."""

    variables: Sequence[tf.Variable]
    values: Callable[[], list[tf.Tensor]]
    trainable: Sequence[tf.Variable]
    of_inputs: Sequence[bool]
    handles: Sequence[tf.Tensor]
    pull_back: Guarded
    of_outputs: Sequence[bool] | None = None


def _pulled_back(
    read: _Read, values: Sequence[tf.Tensor], tensors: Sequence[tf.Tensor]
) -> list[tf.Tensor | None]:
    """Called with ``tensors``, while the variables have the ``values`` of then."""
    call: Callable[..., list[tf.Tensor | None]] = read.pull_back
    with record.stop_recording(), tf.init_scope():
        now = read.values()
    of_all = zip(read.variables, values, now, strict=True)
    others = [(variable, then, new) for variable, then, new in of_all if not _same(then, new)]
    if not others:
        return call(*tensors)
    if not tf.executing_eagerly():
        return _with_others(read, others, tensors)
    with record.stop_recording():
        for variable, then, _ in others:
            variable.assign(then)
    try:
        return call(*tensors)
    finally:
        with record.stop_recording():
            for variable, _, new in others:
                variable.assign(new)


def _with_others(
    read: _Read,
    others: Sequence[tuple[tf.Variable, tf.Tensor, tf.Tensor]],
    tensors: Sequence[tf.Tensor],
) -> list[tf.Tensor | None]:
    """In a graph, which reads variables when it is run: with other ones in their places."""
    if record.should_record_backprop([variable.handle for variable, _, _ in others]):
        names = ", ".join(repr(variable.name) for variable, _, _ in others)
        raise SecondOrderGradientError(
            f"a derivative of a gradient, taken in a graph, of a call after which {names} were "
            "assigned to: expected variables as they were at the call. Take it before they are "
            "changed, or outside of tf.function and tape.jacobian"
        )
    with tf.init_scope():
        made = resource_variable_ops.ResourceVariable  # tf.function makes no tf.Variable here
        of_then = [made(then, trainable=False) for _, then, _ in others]
    tf.compat.v1.get_default_graph()._kept_by_taped = of_then  # as long as it may be run
    places = {id(v.handle): new.handle for (v, _, _), new in zip(others, of_then, strict=True)}
    found: list[tf.Tensor | None] = read.pull_back.made.with_captures(places, tensors)
    return found


def _same(a: tf.Tensor, b: tf.Tensor) -> bool:
    """To the bit. What is noted is not written over, so that the same memory has the same bits."""
    first, second = np.asarray(a), np.asarray(b)
    same_memory = first.__array_interface__["data"] == second.__array_interface__["data"]
    return same_memory or first.tobytes() == second.tobytes()
