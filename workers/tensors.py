"""NumPy arrays as TensorFlow tensors, and what is known of a tensor where it is.

Owns how a number gets from one to the other. A call of the pool makes a few tensors a tile, and one
for each gradient, so what it costs to make one is seen: by DLPack it is a third of what it is by
``tf.constant`` (64 x 4 float32: 22 us and 74, one core of an AMD EPYC, Zen 1, TensorFlow 2.21).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.ops import control_flow_ops, control_flow_util, gradients_util

from workers.context import during
from workers.custom_gradient import custom_gradient
from workers.errors import InputError
from workers.layout import ALIGNMENT

_without_loops: ContextVar[bool] = ContextVar("without_loops", default=False)

#: Tensors that are alike are cut from one where there are more.
_MANY = 3


def tensor_of(array: np.ndarray) -> tf.Tensor:
    """A tensor of the array's shape, dtype and values as they are now: a copy, on the CPU.

    Raises:
        TypeError, ValueError: TensorFlow has no such dtype.
    """
    array = np.asarray(array)
    if not array.dtype.isnative or array.dtype.kind not in "fciu":
        return tf.constant(array)  # NumPy's or TensorFlow's DLPack may not have it
    # Aligned: TensorFlow takes the memory as it is, and its products abort where it is not.
    padded = np.empty(array.size + ALIGNMENT // array.itemsize, array.dtype)
    address = ctypes.addressof(ctypes.c_char.from_buffer(padded))
    start = -address % ALIGNMENT // array.itemsize
    own = padded[start : start + array.size].reshape(array.shape)
    own[...] = array
    return tf.experimental.dlpack.from_dlpack(own.__dlpack__())


def tensors_of(arrays: Sequence[np.ndarray]) -> list[tf.Tensor]:
    """``tensor_of`` each. Of many that are alike, as a circuit's scalars, one tensor is made and
    then cut: for 60 of them that takes a tenth."""
    alike: dict[tuple, list[int]] = {}
    for place, array in enumerate(arrays):
        alike.setdefault((array.shape, array.dtype.str), []).append(place)
    found: dict[int, tf.Tensor] = {}
    for places in alike.values():
        if len(places) > _MANY:
            whole = tensor_of(np.stack([arrays[place] for place in places]))
            parts = tf.raw_ops.Unpack(value=whole, num=len(places), axis=0)
        else:
            parts = [tensor_of(arrays[place]) for place in places]
        found.update(zip(places, parts, strict=True))
    return [found[place] for place in range(len(arrays))]


def shared(array: np.ndarray) -> tf.Tensor | None:
    """A tensor over the array's own memory, on the CPU, which shows what is written there later;
    None where there is none of that dtype or place."""
    if not array.size or not array.dtype.isnative or array.dtype.kind not in "fciu":
        return None
    if array.__array_interface__["data"][0] % ALIGNMENT or not array.flags.c_contiguous:
        return None
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def differentiable(value: Any) -> bool:
    """Whether it is a tensor, or a variable, of numbers that may have a gradient."""
    there = isinstance(value, tf.Tensor | tf.Variable)
    return there and bool(value.dtype.is_floating or value.dtype.is_complex)


def asked_for(cotangents: Sequence[Any]) -> list[bool]:
    """Which of these, as a tape hands them on, its user's gradient is of. Where it is of some of an
    operation's outputs, others get zeros that TensorFlow keeps (of up to 10,000 numbers; of more,
    zeros like any). Stock has no gradient for what these alone depend on."""
    kept = set(map(id, context.context().zeros_cache()._data.values()))
    return [x is not None and id(x) not in kept for x in cotangents]


def leaves(nest: Any) -> list[Any]:
    """What a nest holds, flattened. None, by which a model returns nothing there, is not of it."""
    return [leaf for leaf in tf.nest.flatten(nest) if leaf is not None]


def beside(nest: Any, other: Any) -> list[Any]:
    """What of ``other``, a nest alike, lies where ``nest`` has ``leaves``.

    Raises:
        InputError: it is another nest, or has None there.
    """
    ours, theirs = tf.nest.flatten(nest), tf.nest.flatten(other)
    found = [part for leaf, part in zip(ours, theirs, strict=False) if leaf is not None]
    if len(ours) != len(theirs) or any(part is None for part in found):
        raise InputError(
            f"cotangents have the structure of the outputs: expected {len(ours)} parts, with an "
            f"array for each output; came {other!r}"
        )
    return found


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with ``function`` of each of its ``leaves`` in the leaf's place."""
    return tf.nest.map_structure(lambda leaf: None if leaf is None else function(leaf), nest)


def squared_modulus(amplitude: tf.Tensor) -> tf.Tensor:
    """|amplitude|^2, real: without the root whose gradient is none at zero."""
    return tf.math.real(amplitude) ** 2 + tf.math.imag(amplitude) ** 2


def graph_of_now() -> Any:
    """The graph that operations go into, None if they are computed at once."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def matmul(a: tf.Tensor, b: tf.Tensor, **how: bool) -> tf.Tensor:
    """``tf.matmul``, of matrices and not of stacks of them where each stack is of one.

    oneDNN's product in TensorFlow (2.18 to 2.21) reads beyond its operand where it stretches
    (1, 1, ...) to (n, 1, ...). That is what a derivative of stacks of one would have it do when a
    Jacobian's rows are computed at once (``tf.GradientTape.jacobian``).
    """
    first, second = tf.TensorShape(a.shape), tf.TensorShape(b.shape)
    if first.rank == second.rank == 3 and first[0] == second[0] == 1:
        return tf.matmul(a[0], b[0], **how)[None]
    return tf.matmul(a, b, **how)


def matvec(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """``tf.linalg.matvec``, with the same care."""
    return matmul(a, b[..., None])[..., 0]


def vjp(
    function: Callable[..., Any], inputs: Sequence[tf.Tensor], cotangents: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """The vector-Jacobian product of ``function(*inputs)``, a tensor or a list of them: a gradient
    for each input, zeros where nothing depends on it.

    In a graph it is made of the graph, not on a tape: where TensorFlow traces a function again to
    differentiate it forwards (``tf.autodiff.ForwardAccumulator``), tapes record nothing (2.21), and
    every gradient would be zero.
    """
    zero = tf.UnconnectedGradients.ZERO
    graph = graph_of_now()
    if graph is None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        found: list[tf.Tensor] = tape.gradient(
            outputs, list(inputs), output_gradients=list(cotangents), unconnected_gradients=zero
        )
        return found
    own = list(map(tf.identity, inputs))  # they may be another graph's
    outputs = function(*own)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    found = gradients_util._GradientsHelper(
        outputs, own, list(cotangents), unconnected_gradients=zero, src_graph=graph
    )
    return list(map(tf.convert_to_tensor, found))


def in_graph(function: Callable[..., Any], *args: Any) -> Any:
    """Call a ``tf.function`` of ours as the graph that it is.

    Programs that look into their own functions (``tf.config.run_functions_eagerly``) would
    otherwise have ours run operation by operation too.
    """
    if not tf.config.functions_run_eagerly():
        return function(*args)
    tf.config.run_functions_eagerly(False)
    try:
        return function(*args)
    finally:
        tf.config.run_functions_eagerly(True)


@contextlib.contextmanager
def for_xla() -> Iterator[None]:
    """What is traced within is for XLA, which the graph of a backward pass does not say."""
    compiled = control_flow_ops.XLAControlFlowContext()
    compiled.Enter()
    try:
        yield
    finally:
        compiled.Exit()


def permuted(x: tf.Tensor, order: np.ndarray) -> tf.Tensor:
    """``x[order]``, a permutation, whose vjp is one too (TensorFlow's would be a scatter)."""
    if np.array_equal(order, np.arange(len(order))):
        return x

    @custom_gradient
    def taken(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.gather(x, order), lambda cotangent: permuted(cotangent, np.argsort(order))

    found: tf.Tensor = taken(x)
    return found


def origin(tensor: tf.Tensor) -> tuple[int, ...]:
    """Sorts tensors of a graph that were taken from the same one by their places in it, and eager
    ones not at all."""
    if not tf.is_symbolic_tensor(tensor):
        return ()
    op = tensor.op
    while op.type in ("Cast", "Identity", "Reshape") and tf.is_symbolic_tensor(op.inputs[0]):
        op, tensor = op.inputs[0].op, op.inputs[0]
    if op.type == "Unpack":
        return op.inputs[0].op._id, tensor.value_index
    if op.type == "StridedSlice" and (begin := tf.get_static_value(op.inputs[1])) is not None:
        return op.inputs[0].op._id, *map(int, begin)
    return (op._id,)


def without_loops() -> AbstractContextManager[Any]:
    """What is traced within has no loops: TensorFlow vectorises them to what XLA does not have."""
    return during(_without_loops, True)


def may_loop() -> bool:
    """Not within ``without_loops``."""
    return not _without_loops.get()


def in_loops() -> bool:
    """Whether what is repeated is traced as a loop, which XLA compiles once."""
    return within_xla() and may_loop()


def within_xla() -> bool:
    """Whether what is being traced is for XLA."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
