"""Variables that a call updates, as results of it.

    self.u.assign(u)        a power iteration's vector, in a layer with spectral normalisation
    moving_mean.assign(...) what batch normalisation keeps while it is trained

A call that is compiled is traced, tried and traced again, and must do no more than compute. Within
``held_back`` an assignment is not done but kept, and read where the call reads the variable again;
whoever calls then assigns what was kept, once. Only for variables that no gradient is for: what was
assigned to one has none.

Owns what stands in for TensorFlow's own methods there. Updates of a part of a variable (scatter),
and those in a branch, a loop or a function of TensorFlow's, are left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable, ResourceVariable

from workers.context import during
from workers.errors import UntraceableError
from workers.tensors import graph_of_now


@dataclasses.dataclass(frozen=True)
class _Held:
    """``kept``: what was assigned to the variables that are held back, by their identity.
    ``graph``: that of the call; None if it is eager."""

    kept: dict[int, tf.Tensor | None]
    graph: Any


_held: ContextVar[_Held | None] = ContextVar("held", default=None)

#: Variables that were assigned to, by their identity.
_noticed: ContextVar[dict[int, Any] | None] = ContextVar("noticed", default=None)


@contextlib.contextmanager
def held_back(variables: Sequence[tf.Variable]) -> Iterator[Callable[[], list[tf.Tensor]]]:
    """Have assignments to these variables within this be kept; gives what they come to."""
    _install()
    token = _held.set(_Held({id(variable): None for variable in variables}, graph_of_now()))

    def values() -> list[tf.Tensor]:
        return [variable.read_value() for variable in variables]

    try:
        yield values
    finally:
        _held.reset(token)


@contextlib.contextmanager
def noticing() -> Iterator[dict[int, Any]]:
    """The variables that are assigned to within this, by their identity."""
    _install()
    noticed: dict[int, Any] = {}
    with during(_noticed, noticed):
        yield noticed


@functools.cache
def _install() -> None:
    """Have variables ask first; outside of ``held_back`` they are as they were."""
    for name, combined in (
        ("assign", lambda _, value: value),
        ("assign_add", lambda variable, value: variable.read_value() + value),
        ("assign_sub", lambda variable, value: variable.read_value() - value),
    ):
        _take_over(name, combined)
    read = BaseResourceVariable._read_variable_op

    @functools.wraps(read)
    def read_variable_op(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = _held.get()
        kept = None if held is None else held.kept.get(id(self))
        if kept is None or held is None:
            return read(self, *args, **kwargs)
        graph = graph_of_now()
        if graph is not held.graph and type(graph) is FuncGraph:
            raise UntraceableError(  # which keeps its trace for other calls
                f"{self.name}, which the call has updated, is read by a tf.function of its own"
            )
        return kept

    BaseResourceVariable._read_variable_op = read_variable_op


def _take_over(name: str, combined: Callable[[Any, Any], Any]) -> None:
    original = getattr(BaseResourceVariable, name)

    @functools.wraps(original)
    def assign(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        held = _held.get()
        if held is None or id(self) not in held.kept or held.graph is not graph_of_now():
            if (noticed := _noticed.get()) is not None:
                noticed[id(self)] = self
            return original(self, value, *args, **kwargs)
        kept = tf.convert_to_tensor(combined(self, value), self.dtype)
        self.shape.assert_is_compatible_with(kept.shape)
        held.kept[id(self)] = tf.stop_gradient(kept)
        return self

    for kind in (BaseResourceVariable, ResourceVariable):  # which has them again
        setattr(kind, name, assign)
