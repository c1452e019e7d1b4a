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

from qpool.executors.in_place import choosing
from qpool.executors.in_place.compiled_calls import CompiledCall, CompiledCalls, as_it_is
from qpool.executors.in_place.effects import State
from workers.compiling import compiled
from workers.engine import circuit
from workers.errors import ShippingError
from workers.replica.kept import Kept

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
        self._compiled_calls = CompiledCalls(model, ())

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``function``, the pooled object's method of that name, returns."""
        if _within.get() or not tf.executing_eagerly():
            return as_it_is(function, args, kwargs)
        with self._compiled_calls.lock:
            return self._call(name, function, args, kwargs)

    def _call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            in_place = getattr(self._model, name)
            compiled_call, inputs = self._compiled_calls.find(
                name, in_place, args, kwargs, batched=False
            )
        except (ShippingError, ValueError, TypeError):  # arguments that cannot be told apart
            return as_it_is(function, args, kwargs)
        compiled_for = (
            compiled_call.attributes
            if compiled_call.choice and compiled_call.choice.level != "eager"
            else None
        )
        if compiled_for is not None and compiled_for != _attributes(
            self._model, _own(compiled_call.kept)
        ):
            self._see_again(compiled_call)
        token = _within.set(True)
        try:
            if compiled_call.choice is None:
                return self._observed(compiled_call, inputs, function, args, kwargs)
            if compiled_call.choice.level == "eager":
                return as_it_is(function, args, kwargs)
            if compiled_call.choice.level == "graph" and not compiled_call.choice.reason:
                return self._timed(compiled_call, inputs)
            return self._compiled_calls.run(compiled_call, inputs)
        finally:
            _within.reset(token)

    def stats(self) -> list[dict[str, Any]]:
        """The methods for which a choice was made."""
        return [compiled_call.as_dict() for compiled_call in self._compiled_calls.decided]

    def _see_again(self, compiled_call: CompiledCall) -> None:
        """Attributes of the model are others than when the call was compiled: it is seen anew, or,
        where that happens again and again, called as it is."""
        compiled_call.changes += 1
        compiled_call.attributes = _attributes(self._model, _own(compiled_call.kept))
        if compiled_call.changes > _CHANGES:
            reason = "attributes of the model are changed again and again between its calls"
            compiled_call.choice = compiled.Choice("eager", reason, 0.0)
        else:
            compiled_call.choice, compiled_call.calls = None, 1
            compiled_call.method = compiled_call.method.anew()

    def _observed(
        self,
        compiled_call: CompiledCall,
        inputs: list[tf.Tensor],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = compiled_call.method.plan.method
        state, attributes, pooled = (
            State(self._model, name),
            _attributes(self._model),
            self._pooled_calls(),
        )
        began = time.perf_counter()
        with circuit.untraced(), circuit.tally() as run, _printing() as printed:
            result = as_it_is(function, args, kwargs)
        compiled_call.seconds += time.perf_counter() - began
        compiled_call.calls += 1
        compiled_call.ran = run
        kept = state.kept()
        sets = _own(kept)
        compiled_call.attributes = {n: value for n, value in attributes.items() if n not in sets}
        reason = ""
        if not run.runs:
            reason = "it runs no circuit"
        elif self._pooled_calls() != pooled:
            reason = "it calls what is pooled"
        elif printed():
            reason = "it prints"
        elif _attributes(self._model, sets) != compiled_call.attributes:
            reason = "it changes attributes of the model"
        else:
            reason = state.what_changed()
        if reason:
            compiled_call.choice = compiled.Choice("eager", reason, 0.0)
        elif compiled_call.calls > 1:
            with circuit.uncompiled():
                compiled_call.choice = choosing.choose(
                    compiled_call, self._model, inputs, result, "", ("graph",), kept
                )
            compiled_call.seconds = 0.0
        return result

    def _timed(self, compiled_call: CompiledCall, inputs: list[tf.Tensor]) -> Any:
        """Call the graph; have XLA compile it when that has been worth it."""
        assert compiled_call.choice is not None
        began = time.perf_counter()
        result = self._compiled_calls.run(compiled_call, inputs)
        compiled_call.seconds += time.perf_counter() - began
        if compiled_call.seconds > _COMPILING * compiled_call.choice.seconds:
            better = choosing.choose(
                compiled_call, self._model, inputs, result, "", ("xla",), compiled_call.kept
            )
            if better.level == "eager":
                compiled_call.choice = dataclasses.replace(
                    compiled_call.choice, reason=better.reason or "not by XLA"
                )
            else:
                compiled_call.choice = better
        return result


def _own(kept: Sequence[Kept]) -> list[Any]:
    """Those that are the model's attributes."""
    return [each.key for each in kept if each.is_attribute]


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
