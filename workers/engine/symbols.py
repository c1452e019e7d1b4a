"""What a model's Python asks of a tensor without a value, answered where it is known all the same.

``for row in z``, ``range(tf.shape(z)[0])``, ``if tf.rank(x) > 0``, ``len(z)``, ``.numpy()`` of a
grid's step: eagerly they are numbers, and while a graph is traced TensorFlow refuses them, although
shapes, and what is computed of constants alone, are known there too. Within ``answered`` they are
what they are eagerly; what is truly not known is refused as before. So is a ``tf.constant`` of a
tensor that tensor. ``tf.map_fn`` is the loop in Python there that it is eagerly, and not a loop of
the graph's, whose turns nothing can be done about. Owns that, for this thread's traces alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.autograph.impl.api import autograph_artifact
from tensorflow.python.framework.ops import SymbolicTensor
from tensorflow.python.framework.smart_cond import smart_constant_value

from workers.context import during

_answered = ContextVar("answered", default=False)

#: Says whether a condition holds that is not known.
Decide = Callable[[tf.Tensor], bool]
_decide: ContextVar[Decide | None] = ContextVar("decide", default=None)


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Within, sizes are numbers and rows can be gone through while a graph is traced."""
    _install()
    with during(_answered, True):
        yield


def deciding(decide: Decide) -> AbstractContextManager[Any]:
    """Within this and ``answered``, a condition that is not known holds if ``decide`` says so."""
    return during(_decide, decide)


def _array(tensor: tf.Tensor) -> Any:
    """The value of what is computed of constants alone; else None."""
    return smart_constant_value(tensor) if _answered.get() else None


def _value(tensor: tf.Tensor) -> Any:
    """A scalar's value, if the graph tells; else None."""
    return _array(tensor) if tensor.shape.rank == 0 else None


def _truth(tensor: tf.Tensor) -> bool | None:
    value, decide = _value(tensor), _decide.get()
    if value is None and decide is not None and _answered.get() and tensor.shape.rank == 0:
        return decide(tensor if tensor.dtype == tf.bool else tensor != 0)
    return value if value is None else bool(value)


def _rows(tensor: tf.Tensor) -> Iterator[tf.Tensor] | None:
    if not _answered.get() or not tensor.shape.rank or tensor.shape[0] is None:
        return None
    return iter(tf.unstack(tensor))


def _length(tensor: tf.Tensor) -> int | None:
    if not _answered.get() or not tensor.shape.rank:
        return None
    length: int | None = tensor.shape[0]
    return length


_constant, _map_fn = tf.constant, tf.map_fn


@autograph_artifact  # which AutoGraph takes as it is, as it does TensorFlow's own
def constant(value: Any, dtype: Any = None, shape: Any = None, name: str = "Const") -> Any:
    """``tf.constant``: of a tensor that tensor, as it is eagerly, gradient and all."""
    symbolic = _answered.get() and isinstance(value, SymbolicTensor)
    if symbolic and shape is None and dtype in (None, value.dtype):
        return value
    return _constant(value, dtype, shape, name)


@autograph_artifact
def map_fn(fn: Callable[..., Any], elems: Any, *args: Any, **kwargs: Any) -> Any:
    """``tf.map_fn``: a loop in Python, where the number of rows is known."""
    leaves = tf.nest.flatten(elems)
    lengths = {leaf.shape[0] for leaf in leaves if tf.is_tensor(leaf) and leaf.shape.rank}
    known = len(lengths) == 1 and None not in lengths and all(map(tf.is_tensor, leaves))
    if not known or not _answered.get() or tf.executing_eagerly():
        return _map_fn(fn, elems, *args, **kwargs)
    columns = [tf.unstack(leaf) for leaf in leaves]
    found = [fn(tf.nest.pack_sequence_as(elems, row)) for row in zip(*columns, strict=True)]
    return tf.nest.map_structure(lambda *rows: tf.stack(rows), *found)


@functools.cache
def _install() -> None:
    def answer(name: str, known: Callable[[Any], Any], convert: Callable[[Any], Any]) -> None:
        before = getattr(SymbolicTensor, name, None)

        def method(self: Any) -> Any:
            value = known(self)
            if value is not None:
                return convert(value)
            if before is None:
                raise TypeError(f"{self!r} has no value while a graph is traced: expected a number")
            return before(self)

        setattr(SymbolicTensor, name, method)

    def numpy(self: Any) -> Callable[[], Any]:
        value = _array(self)
        if value is None:  # hasattr(tensor, "numpy") is False then, as it is without us
            raise AttributeError(f"{self!r} has no numpy() while a graph is traced")
        return lambda: value

    tf.constant = constant
    tf.map_fn = map_fn
    SymbolicTensor.numpy = property(numpy)
    array = SymbolicTensor.__array__

    def as_array(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = _array(self)
        return array(self, *args, **kwargs) if value is None else np.array(value, *args, **kwargs)

    SymbolicTensor.__array__ = as_array
    answer("__bool__", _truth, bool)
    answer("__index__", _value, lambda value: value.__index__())
    answer("__int__", _value, int)
    answer("__float__", _value, float)
    answer("__len__", _length, int)
    answer("__iter__", _rows, iter)
