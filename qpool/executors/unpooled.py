"""Methods of a pooled model that nobody named: called in this process, on the traced engine.

A trainer's validation calls the same circuit for one latent vector. Owns when such a call is
compiled, if it does nothing but compute: the first one runs operation by operation, with the second
it becomes a graph, which takes as long to trace as a few calls did, and once its calls have taken
together what XLA is expected to, it is compiled. So it costs no more than twice what would have
been best, however often it is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

from qpool.executors.ways import State, Way, Ways, as_it_is
from workers.compiling import compiled
from workers.engine import circuit
from workers.errors import ShippingError

#: XLA takes about so many times as long as tracing the graph did.
_COMPILING = 5.0

#: How often attributes of the model may change before a method of it is no longer compiled.
_CHANGES = 4

#: Whether a call of this kind is under way: what it calls itself is part of it.
_within = ContextVar("within", default=False)


class Unpooled:
    """The methods of ``model`` that are not pooled, called on ``pooled``, the object over it."""

    def __init__(self, model: Any, pooled_calls: Callable[[], int]) -> None:
        self._model = model
        self._pooled_calls = pooled_calls
        self._ways = Ways(model, ())

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``function``, the pooled object's method of that name, returns."""
        if _within.get() or not tf.executing_eagerly():
            return as_it_is(function, args, kwargs)
        try:
            in_place = getattr(self._model, name)
            way, inputs = self._ways.find(name, in_place, args, kwargs, batched=False)
        except (ShippingError, ValueError, TypeError):  # arguments that cannot be told apart
            return as_it_is(function, args, kwargs)
        compiled_for = way.attributes if way.choice and way.choice.level != "eager" else None
        if compiled_for is not None and compiled_for != _attributes(self._model, way.sets):
            self._see_again(way)
        token = _within.set(True)
        try:
            if way.choice is None:
                return self._observed(way, inputs, function, args, kwargs)
            if way.choice.level == "eager":
                return as_it_is(function, args, kwargs)
            if way.choice.level == "graph" and not way.choice.reason:
                return self._timed(way, inputs)
            return self._ways.run(way, inputs)
        finally:
            _within.reset(token)

    def stats(self) -> list[dict[str, Any]]:
        """The methods for which a choice was made."""
        return [way.as_dict() for way in self._ways.decided]

    def _see_again(self, way: Way) -> None:
        """Attributes of the model are others than when the way was compiled: it is seen anew, or,
        where that happens again and again, called as it is."""
        way.changes += 1
        way.attributes = _attributes(self._model, way.sets)
        if way.changes > _CHANGES:
            reason = "attributes of the model are changed again and again between its calls"
            way.choice = compiled.Choice("eager", reason, 0.0)
        else:
            way.choice, way.calls = None, 1
            way.method = way.method.anew()

    def _observed(
        self,
        way: Way,
        inputs: list[tf.Tensor],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        state, attributes, pooled = (
            State(self._model),
            _attributes(self._model),
            self._pooled_calls(),
        )
        began = time.perf_counter()
        with circuit.untraced(), circuit.tally() as run, _printing() as printed:
            result = as_it_is(function, args, kwargs)
        way.seconds += time.perf_counter() - began
        way.calls += 1
        sets = state.set_to_tensors()
        way.attributes = {n: value for n, value in attributes.items() if n not in sets}
        reason = ""
        if not run.runs:
            reason = "it runs no circuit"
        elif self._pooled_calls() != pooled:
            reason = "it calls what is pooled"
        elif printed():
            reason = "it prints"
        elif _attributes(self._model, sets) != way.attributes:
            reason = "it changes attributes of the model"
        else:
            reason = state.what_changed()
        if reason:
            way.choice = compiled.Choice("eager", reason, 0.0)
        elif way.calls > 1:
            with circuit.uncompiled():
                way.choice = self._ways.choose(way, inputs, result, "", run.runs, ("graph",), sets)
            way.seconds = 0.0
        return result

    def _timed(self, way: Way, inputs: list[tf.Tensor]) -> Any:
        """Call the graph; have XLA compile it when that has been worth it."""
        assert way.choice is not None
        began = time.perf_counter()
        result = self._ways.run(way, inputs)
        way.seconds += time.perf_counter() - began
        if way.seconds > _COMPILING * way.choice.seconds:
            better = self._ways.choose(way, inputs, result, "", 0, ("xla",), way.sets)
            if better.level == "eager":
                way.choice = dataclasses.replace(way.choice, reason=better.reason or "not by XLA")
            else:
                way.choice = better
        return result


def _attributes(model: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """What a call may change of a model, or depend on, beside its variables: plain values, which
    other objects it holds, and how many of them. Those that are its results are left out."""
    plain = (bool, int, float, complex, str, bytes, type(None))
    return {
        name: value
        if isinstance(value, plain)
        else (id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for name, value in vars(model).items()
        if name not in without
    }


@contextlib.contextmanager
def _printing() -> Iterator[Callable[[], bool]]:
    """Whether anything is printed within, which reaches its place all the same."""
    seen = [False]

    class Watched(io.TextIOBase):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def write(self, text: str) -> int:
            seen[0] = True
            return int(self._stream.write(text))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    with (
        contextlib.redirect_stdout(Watched(sys.stdout)),
        contextlib.redirect_stderr(Watched(sys.stderr)),
    ):
        yield lambda: seen[0]
