"""Functions as models: what computes without being a class.

    weights = tf.Variable(...)
    engine = sf.Engine("tf", ...)

    def generate(z):
        ...engine.run(program, args={..., "w": weights[0]})...

Owns what a function leads to beside its arguments: variables and engines among the globals that it
uses, of its own module and of those of the user's that it calls, and in what it closes over.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cloudpickle

from workers.replica import serialization

#: Where libraries lie, whose functions hold nothing of the user's; and packages that are ours.
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
_OURS = ("qpool", "workers")

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)


class FunctionModel:
    """A function, called as it is, with what it leads to.

    Attributes:
        call: the function.
        reached: what it leads to.
        trainable_variables: those of the function's own object, if it is a method; else all that
            are trainable in what it leads to. It has no such attribute if there are none.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function, updated=())
        self.call = function
        self.look()

    def look(self) -> list[Place]:
        """Take over what the function leads to now; where its variables were found."""
        places = list(_places(self.call))
        self.reached = [place.value for place in places]
        owner = getattr(self.call, "__self__", None)
        found = serialization.trainable_variables(owner) or [
            variable for variable in _variables(self.reached) if variable.trainable
        ]
        self.__dict__.pop("trainable_variables", None)
        if found:
            self.trainable_variables = found
        return [place for place in places if _variables(place.value)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Place:
    """Something that a function leads to, by the ``key`` of the ``space`` that it was found in: a
    module's globals, or a variable of what is around a function."""

    space: Any
    key: str
    value: Any

    def is_there(self) -> bool:
        """Whether it has not been bound anew."""
        return _found(self.space, self.key) is self.value


def is_function(value: Any) -> bool:
    """Of Python's: also a method of an object, a partial one, and what ``tf.function`` makes."""
    return isinstance(_plain(value), types.FunctionType)


def takes_arguments(value: Any) -> bool:
    """Whether it cannot be called without."""
    try:
        inspect.signature(getattr(value, "python_function", value)).bind()
    except TypeError:
        return True
    except ValueError:  # no signature to be had: calling it will tell
        return False
    return False


def as_model(made: Any) -> Any:
    """What a factory made, as a model."""
    plain = not hasattr(made, "trainable_variables") and is_function(made)
    return FunctionModel(made) if plain else made


@contextlib.contextmanager
def travelling(model: Any) -> Iterator[None]:
    """Have a function be pickled with the variables that it leads to, not by the name under which
    another process would find it with variables of its own."""
    modules: list[types.ModuleType] = []
    model = getattr(model, "model", model)  # with a loss, or with weights
    if isinstance(model, FunctionModel):
        known = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
        modules = [sys.modules[n] for n in sorted(_modules(model.call) - known) if n in sys.modules]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def names(code: types.CodeType) -> Iterator[str]:
    """All names that a function, and those within it, may look up in its module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names(constant)


def _variables(value: Any) -> list[Any]:
    import tensorflow as tf

    return [part for part in serialization.walk(value) if isinstance(part, tf.Variable)]


def _layers(value: Any) -> Iterator[Any]:
    """What is called in turn, the Python function last."""
    inner = value
    while inner is not None:
        yield inner
        if isinstance(inner, functools.partial):
            inner = inner.func
        else:
            inner = getattr(inner, "__func__", None) or getattr(inner, "python_function", None)


def _plain(value: Any) -> Any:
    return list(_layers(value))[-1]


def _functions(root: Any) -> list[Any]:
    """The function and all of the user's that it leads to."""
    found: list[Any] = []
    ahead = [root]
    while ahead:
        function = ahead.pop(0)
        if all(function is not other for other in found):
            found.append(function)
            ahead += [p.value for p in _places_of(function, root) if is_function(p.value)]
    return found


def _places(root: Any) -> Iterator[Place]:
    """All that it leads to, each once, but functions."""
    seen: set[int] = set()
    for function in _functions(root):
        for place in _places_of(function, root):
            if id(place.value) not in seen and not is_function(place.value):
                seen.add(id(place.value))
                yield place


def _places_of(function: Any, root: Any) -> Iterator[Place]:
    for space, keys in _spaces(function, root):
        for key in keys:
            value = _found(space, key)
            if not isinstance(value, _PLAIN):
                yield Place(space, key, value)


def _spaces(function: Any, root: Any) -> Iterator[tuple[Any, list[str]]]:
    """Where a function finds things, and by which names: in its object, in what it was given
    before, around it, in its module."""
    for layer in _layers(function):
        if isinstance(layer, functools.partial):
            given = {f"argument {n}": value for n, value in enumerate(layer.args)} | layer.keywords
            yield given, list(given)
        elif isinstance(layer, types.MethodType):
            yield {"self": layer.__self__}, ["self"]
        elif isinstance(layer, types.FunctionType):
            defaults = {
                name: parameter.default
                for name, parameter in inspect.signature(
                    layer, follow_wrapped=False
                ).parameters.items()
                if parameter.default is not parameter.empty
            }
            yield defaults, list(defaults)
            for name, cell in zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True):
                yield cell, [name]
            if _is_the_users(layer, root):
                yield layer.__globals__, list(dict.fromkeys(names(layer.__code__)))


def _found(space: Any, key: str) -> Any:
    """What is there, None if nothing is."""
    if isinstance(space, dict):
        return space.get(key)
    with contextlib.suppress(ValueError):  # an empty cell
        return space.cell_contents
    return None


def _modules(root: Any) -> set[str]:
    """Those of the user's functions that it calls."""
    plain = map(_plain, _functions(root))
    return {f.__module__ for f in plain if _is_the_users(f, root)}


def _is_the_users(function: Any, root: Any) -> bool:
    """Whether it was written with what leads to it, or in no library."""
    package, own = (str(_plain(f).__module__).partition(".")[0] for f in (function, root))
    if package in _OURS:
        return False
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return package == own or file is None or not file.startswith(_LIBRARIES)
