"""What a call does beside returning: to a model's variables and attributes, and by drawing.

Owns how that is seen, how a call that is compiled returns it, and how it is undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from workers.compiling import updates
from workers.replica import probe, serialization
from workers.replica.draws import global_states
from workers.replica.kept import Before, Keeping, Kept, Wrapped


class State:
    """What a call of a method may change in a model, and in what it draws from."""

    def __init__(self, model: Any, method: str) -> None:
        self._model = model
        self._shipped = serialization.inspect(model, {})
        self._values = [_number(variable) for variable in self._shipped.variables]
        self._attributes = dict(getattr(model, "__dict__", {}))
        self._before = Before(model, method)
        self._sources = self._stands()

    def updated(self, assigned: Container[int]) -> list[tuple[tf.Variable, Any]]:
        """Those that no gradient is for of the variables that were ``assigned`` to, known by
        identity, with their values now."""
        return [
            (variable, _number(variable))
            for variable in self._shipped.variables
            if id(variable) in assigned and not (variable.trainable and variable.dtype.is_floating)
        ]

    def drew(self, updated: Sequence[tuple[tf.Variable, Any]]) -> bool:
        """Whether it drew from sources of the model's that stand in variables that it updated."""
        return not self._states().isdisjoint(id(variable) for variable, _ in updated)

    def _stands(self) -> list[Any]:
        """Where the sources stand that do not stand in variables, the process's own among them."""
        unseen = [s for s in self._shipped.draws if not serialization.state_variables(s)]
        return [*map(serialization.where_it_stands, unseen), global_states()]

    def _states(self) -> set[int]:
        """The variables that sources of random numbers stand in, by identity."""
        sources = self._shipped.draws
        return {id(v) for source in sources for v in serialization.state_variables(source)}

    def what_changed(self, besides: Sequence[tuple[tf.Variable, Any]] = ()) -> str:
        """Why the call did more than compute, or update variables; empty if it did not."""
        known = {id(variable) for variable, _ in besides}
        states = self._states()
        for variable, value in zip(self._shipped.variables, self._values, strict=True):
            if id(variable) not in known and not _same(_number(variable), value):
                if id(variable) in states:
                    return "the model draws random numbers"
                return f"the call changes its variable {variable.name!r}"
        if self._stands() != self._sources:
            return "the model draws random numbers"
        weights = getattr(self._model, "trainable_weights", ())
        regularised = sum(getattr(v, "regularizer", None) is not None for v in weights)
        if probe.losses(self._model) > regularised:
            return "the call adds losses"
        return ""

    def kept(self) -> list[Kept]:
        """Where the call has left tensors."""
        return self._before.kept()

    @contextlib.contextmanager
    def again(self, updated: Sequence[tuple[tf.Variable, Any]]) -> Iterator[None]:
        """Within this, variables have the values of before again."""
        if updated:
            self.put_back()
        try:
            yield
        finally:
            for variable, value in updated:
                variable.assign(value)

    @contextlib.contextmanager
    def other_numbers(self) -> Iterator[None]:
        """Within this, numbers that the call changed in the model are others altogether: what is
        compiled goes on with those of now, and must not depend on them."""
        now = getattr(self._model, "__dict__", {})
        changed: dict[str, Any] = {
            name: value
            for name, value in now.items()
            if type(value) in (int, float) and type(self._attributes.get(name)) is type(value)
            if value != self._attributes[name]
        }
        now.update({name: 2 * value + 1 for name, value in changed.items()})
        try:
            yield
        finally:
            now.update(changed)

    def put_back(self) -> None:
        """Give the variables that were changed their values again."""
        for variable, value in zip(self._shipped.variables, self._values, strict=True):
            if not _same(_number(variable), value):
                variable.assign(value)


def _number(variable: tf.Variable) -> np.ndarray:
    """Its value, of which no tape is told."""
    with record.stop_recording():
        found: np.ndarray = variable.numpy()
    return found


def _same(a: Any, b: Any) -> bool:
    """To the bit; of strings, which are objects, by value."""
    a, b = np.asarray(a), np.asarray(b)
    return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()


def returning(
    call: Callable[..., Any],
    model: Any,
    method: str,
    kept: Sequence[Kept],
    lost: Sequence[Kept],
    updated: Sequence[tf.Variable],
) -> Callable[..., Any]:
    """A call of a model's that returns what it has ``kept``, and values that it would have given to
    variables, with its result: what it returned before, of others or none. What is ``lost`` is not
    to be looked at."""
    while isinstance(call, Wrapped):
        call = call.plain
    call = Keeping(call, model, method, kept, lost)
    if updated:
        call = _Updating(call, model, updated)
    return call


class _Updating(Wrapped):
    """What it would have assigned to variables."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        with updates.held_back(self._what) as values:
            result = self.plain(*args, **kwargs)
            return result, values()
