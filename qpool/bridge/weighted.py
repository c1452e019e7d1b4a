"""Calls that are given weights: variables and tensors among their arguments that are no batch.

    def circuit(z, weights): ...

Owns which arguments those are, and a place in the workers for each way of giving some. They go
there as a model's own variables do, and gradients come back for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from qpool.bridge import tapes
from qpool.bridge.arguments import are_plain, argument_names, is_eager
from qpool.bridge.gradient import Bridge
from workers.errors import InputError, RemoteError
from workers.exchange.protocol import stands_for
from workers.replica.with_weights import Given, Weight, WithWeights

_VARIABLES = (tf.Variable, keras.Variable)

#: What may be a weight, or hold some.
_PERHAPS = (*_VARIABLES, tf.Tensor, list, tuple, dict)


class Weighted:
    """Such calls of one model. ``bridge`` makes a bridge to workers of a ``WithWeights`` model;
    ``in_place`` computes a call in this process."""

    def __init__(
        self,
        model: Any,
        sharded: Sequence[str],
        bridge: Callable[[WithWeights], Bridge],
        in_place: Callable[..., Any],
    ) -> None:
        self._model = model
        self._sharded = frozenset(sharded)
        self._bridge = bridge
        self._in_place = in_place
        self._known: dict[Any, tuple[WithWeights, Bridge]] = {}
        self._signatures: dict[Any, tuple[str, ...]] = {}
        #: Methods, and shapes of the weights that they are called with, alone or first.
        self._alone: set[tuple[str, tuple[int, ...]]] = set()

    def find(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any] | None:
        """The call, if it is one. One that is given weights and no batch to share out is computed
        in this process."""
        if args and isinstance(args[0], _VARIABLES):
            if (method, tuple(args[0].shape)) in self._alone:
                return lambda: self._in_place(method, args, kwargs)
            if len(args) == 1 and not kwargs:
                return None
        if not any(isinstance(x, _PERHAPS) for x in (*args[1:], *kwargs.values())) and not (
            args and isinstance(args[0], list | tuple | dict)
        ):
            return None
        names = self._names(method, len(args), *kwargs)
        further = not self._sharded.isdisjoint(names[1:])
        weights: list[Any] = []

        def taken(value: Any) -> Any:
            if not _is_weight(value):
                return value
            weights.append(value)
            return Given(len(weights) - 1)

        marked = [
            value
            if name in self._sharded or (n == 0 and _is_batch(value, further))
            else tf.nest.map_structure(taken, value)
            for n, (name, value) in enumerate(zip(names, (*args, *kwargs.values()), strict=True))
        ]
        if not weights:
            return None
        if stands_for(marked[0], Given) and not further:
            return lambda: self._in_place(method, args, kwargs)
        model, bridge = self._place(method, weights)
        positional, named = marked[: len(args)], marked[len(args) :]
        values = dict(zip(map(id, model.weights), weights, strict=True))
        every = [values.get(id(v), v) for v in bridge.remote.variables]

        def call() -> Any:
            try:
                keywords = dict(zip(kwargs, named, strict=True))
                return bridge.call("__call__", tuple(positional), keywords, every)
            except RemoteError as error:
                given = dict(zip(names, (*args, *kwargs.values()), strict=True))
                if suspects := self._as_long_as_the_batch(given):
                    raise InputError(
                        f"{', '.join(suspects)}: as many rows as the batch has, all of which "
                        "workers get with some of the batch's. If that is a batch too, name it: "
                        f"sharded={tuple(suspects)!r}"
                    ) from error
                raise

        return call

    def _as_long_as_the_batch(self, given: dict[str, Any]) -> list[str]:
        """Which arguments are weights that have a row for each of the first one's."""
        first, *further = given
        rows = (getattr(given[first], "shape", None) or [None])[0]
        return [
            name
            for name in further
            if name not in self._sharded and rows is not None
            for leaf in tf.nest.flatten(given[name])
            if _is_weight(leaf) and tuple(leaf.shape)[:1] == (rows,)
        ]

    def has_no_batch(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a method has no arguments, or is given nothing but plain values, a number first,
        say."""
        if not (args or kwargs):
            return not argument_names(self._model, method)
        if self._alone and len(args) == 1 and not kwargs:
            shape = getattr(args[0], "shape", None)
            if shape is not None and (method, tuple(shape)) in self._alone:
                return True
        return are_plain([*args, *kwargs.values()])

    def _names(self, method: str, positional: int, *named: str) -> tuple[str, ...]:
        key = method, positional, named
        if key not in self._signatures:
            names = argument_names(self._model, method)[:positional]
            unnamed = (f"argument {n}" for n in range(len(names), positional))
            self._signatures[key] = (*names, *unnamed, *named)
        return self._signatures[key]

    @staticmethod
    def may_be(only: Any) -> bool:
        """Whether a call with this argument alone may be given weights."""
        return isinstance(only, list | tuple | dict | tf.Variable | keras.Variable)

    @staticmethod
    def may_be_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what was taken for a batch, and could not be one, may be weights, or one vector:
        a variable, or what has one axis and is alone."""
        if not args:
            return False
        alone = len(args) == 1 and not kwargs and len(getattr(args[0], "shape", ())) == 1
        return alone or isinstance(args[0], _VARIABLES)

    def are_weights(self, method: str, args: tuple[Any, ...]) -> None:
        """They are, from now on: there is no batch at all."""
        self._alone.add((method, tuple(args[0].shape)))

    @property
    def bridges(self) -> list[Bridge]:
        return [bridge for _, bridge in self._known.values()]

    def close(self) -> None:
        for bridge in self.bridges:
            bridge.close()
        self._known.clear()

    def _place(self, method: str, weights: Sequence[Any]) -> tuple[WithWeights, Bridge]:
        told = tuple(_told(weight) for weight in weights)
        if (method, told) not in self._known:
            with tf.init_scope():  # variables have values there, also where a step is traced
                model = WithWeights(self._model, method, told)
                self._known[method, told] = model, self._bridge(model)
        return self._known[method, told]


def _is_batch(first: Any, further: bool) -> bool:
    """Whether the first argument is a batch. It is none if it holds variables, or is one and a
    ``further`` argument is a batch."""
    if isinstance(first, list | tuple | dict):
        return not any(isinstance(leaf, _VARIABLES) for leaf in tf.nest.flatten(first))
    return not (further and isinstance(first, _VARIABLES))


def _is_weight(value: Any) -> bool:
    """A variable, or a tensor of which a gradient may be asked, or which has no value yet."""
    if isinstance(value, _VARIABLES):
        return True
    return isinstance(value, tf.Tensor) and (
        not is_eager(value) or tapes.watched([value], otherwise=False)
    )


def _told(weight: Any) -> Weight:
    if None in tf.TensorShape(weight.shape).as_list():
        raise InputError(
            f"a tensor of shape {weight.shape} among the arguments: what is no batch must have a "
            "shape that is known while a graph is traced. If it is one, name it: sharded=(...)"
        )
    as_variable = isinstance(weight, tf.Variable)
    return Weight(tuple(weight.shape), tf.as_dtype(weight.dtype).name, as_variable)
