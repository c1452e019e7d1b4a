"""``tf.custom_gradient`` that leaves nothing behind, and that TensorFlow can vectorise.

In a graph TensorFlow keeps a gradient function, and so the graph that it refers to, for ever: in
its registry, under a name made for it. And what ``tf.vectorized_map`` makes of the operation has
the gradient of an identity. Here the operation has the function, the registry finds it there, and
what is vectorised has the gradient that is vectorised.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.parallel_for.pfor import PFor, wrap


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``tf.custom_gradient``, of tensors alone."""
    made = tf.custom_gradient(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        found = made(*args)
        for tensor in tf.nest.flatten(found):
            if tf.is_symbolic_tensor(tensor) and tensor.op.type == "IdentityN":
                _given_to(tensor.op)
                break
        return found

    return call


def _given_to(operation: Any) -> None:
    """The registered gradient of ``operation``, and of no other one, is kept by it alone."""
    registered = ops.gradient_registry._registry
    name = operation.get_attr("_gradient_op_type").decode()
    gradient = registered[name]["type"]
    owned = weakref.ref(gradient, lambda _: registered.pop(name, None))
    registered[name]["type"] = functools.partial(_asked, owned)
    operation._gradient_function = gradient
    operation.pfor_converter = _vectorised


def _asked(owned: Callable[[], Any], *args: Any) -> Any:
    return owned()(*args)


def _vectorised(given: Any) -> list[Any]:
    """What the operation is for all rows at once: an identity, whose gradient is that of each."""
    stacked = [x.is_stacked for x in given.inputs]
    graph = tf.compat.v1.get_default_graph()

    @custom_gradient
    def identity(*values: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
        def pull_back(*cotangents: tf.Tensor) -> list[tf.Tensor | None]:
            return _gradients(given, graph, cotangents, stacked)

        return [tf.identity(x) for x in values], pull_back

    found = identity(*(x.t for x in given.inputs))
    return [wrap(x, flag) for x, flag in zip(found, stacked, strict=True)]


def vectoriser(pfor: PFor, one: FuncGraph) -> PFor:
    """What vectorises ``one``, a graph for a row, over the rows that ``pfor`` is for."""
    return PFor(
        pfor.loop_var,
        pfor.loop_len_vector[0],
        one.get_operations(),
        fallback_to_while_loop=pfor.fallback_to_while_loop,
        all_indices=pfor.all_indices,
        all_indices_partitioned=pfor.all_indices_partitioned,
        pfor_config=pfor.pfor_config,
    )


def _gradients(
    given: Any, graph: Any, cotangents: Sequence[tf.Tensor], stacked: Sequence[bool]
) -> list[tf.Tensor | None]:
    """The operation's gradients for its inputs: where an input is one for all rows, their sum.
    ``graph`` is where the rows were vectorised."""
    one = FuncGraph("row")
    with one.as_default():
        own = [
            tf.compat.v1.placeholder(x.dtype, x.shape[1:] if flag else x.shape)
            for x, flag in zip(cotangents, stacked, strict=True)
        ]
        of_row = [
            None if x is None else one.capture(tf.convert_to_tensor(x))
            for x in given.op._gradient_function(given.op, *own)
        ]
    pfor, rows = given.pfor, given.pfor.loop_len_vector[0]
    converter = vectoriser(pfor, one)
    for x, cotangent, flag in zip(own, cotangents, stacked, strict=True):
        converter._add_conversion(x, wrap(cotangent, flag))
    for outer, inner in one.captures:
        with graph.as_default():
            symbolic = tf.is_symbolic_tensor(outer)
            value = pfor._convert_helper(outer) if symbolic else wrap(outer, False)
        converter._add_conversion(inner, value)

    def of_all(gradient: tf.Tensor | None, flag: bool) -> tf.Tensor | None:
        if gradient is None:
            return None
        found = converter._convert_helper(gradient)
        if flag:
            return found.t if found.is_stacked else tf.repeat(found.t[None], rows, axis=0)
        return (
            tf.reduce_sum(found.t, 0)
            if found.is_stacked
            else found.t * tf.cast(rows, found.t.dtype)
        )

    return list(map(of_all, of_row, stacked))
