"""A call's own Python that goes one way or another by a number, as the graph's conditionals.

    if score < 0: center = self.low      # a number of the data, which no graph knows
    else:         center = self.high

The call is traced until it asks for such a number, and from there on in both ways, each of them the
branch of a ``tf.cond``: so what is computed, and what has a gradient, is what it is eagerly. Owns
that; which rows a condition may depend on is for others to check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_tfe

from workers.context import during
from workers.engine import symbols
from workers.errors import UntraceableError

#: Numbers that one call may ask for, one after another: each doubles what is traced.
DEPTH = 4

_seen: ContextVar[list[tf.Tensor] | None] = ContextVar("seen", default=None)


@contextlib.contextmanager
def noticed() -> Iterator[list[tf.Tensor]]:
    """The conditions that what is traced within asks for. What depends on what may then be seen in
    the graph alone, not from a call's few rows."""
    seen: list[tf.Tensor] = []
    with during(_seen, seen):
        yield seen


class _Asked(BaseException):
    """That a number was asked for. No ``Exception``: a model that catches all of these goes on."""

    def __init__(self, condition: tf.Tensor) -> None:
        super().__init__(condition)
        self.condition = condition


def followed(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of symbolic tensors, both ways wherever its Python asks for one.

    Raises:
        UntraceableError: it asks again and again.
    """

    def either_way(*inputs: tf.Tensor) -> Any:
        return _path(call, inputs, ())

    return either_way


def _path(call: Callable[..., Any], inputs: tuple[tf.Tensor, ...], taken: tuple[bool, ...]) -> Any:
    """The call's outputs, if the first answers are those that are ``taken``."""
    left = list(taken)

    def answer(condition: tf.Tensor) -> bool:
        if left:
            return left.pop(0)
        raise _Asked(condition)

    try:
        with symbols.deciding(answer), recording(True):
            return call(*inputs)
    except _Asked as asked:
        condition = asked.condition
    seen = _seen.get()
    if seen is not None:
        seen.append(condition)
    if len(taken) == DEPTH:
        raise UntraceableError(
            f"its Python decides more than {DEPTH} times by numbers that are not known while it is "
            "traced; decide by tf.where"
        )
    with recording(False):
        return tf.cond(
            condition,
            lambda: _path(call, inputs, (*taken, True)),
            lambda: _path(call, inputs, (*taken, False)),
        )


@contextlib.contextmanager
def recording(on: bool) -> Iterator[None]:
    """Whether tapes record what is traced within. Of a conditional, or a loop, that two of them
    record, TensorFlow makes the gradient's gradient at once, whether one asks for it or not."""
    before = not pywrap_tfe.TFE_Py_TapeSetIsStopped()
    _record(on)
    try:
        yield
    finally:
        _record(before)


def _record(on: bool) -> None:
    if on == pywrap_tfe.TFE_Py_TapeSetIsStopped():
        (
            pywrap_tfe.TFE_Py_TapeSetRestartOnThread
            if on
            else pywrap_tfe.TFE_Py_TapeSetStopOnThread
        )()
