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
import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cloudpickle

from workers.replica import serialization

#: Where libraries lie, whose functions hold nothing of the user's; and packages that are ours.
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
_OURS = ("qpool", "workers")

#: What is compiled as a constant, and may be another one later.
_SETTINGS = (bool, int, float, complex, str)

#: Numbers of an array that is compared in each call.
_LARGEST = 4096

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


@dataclass(frozen=True, eq=False)
class Program(Place):
    """A program of Strawberry Fields', to which gates may be added."""

    gates: int

    def is_there(self) -> bool:
        """Whether it is the same. What had no gates is built by the call itself."""
        return super().is_there() and self.gates in (0, len(self.value.circuit))


@dataclass(frozen=True, eq=False)
class Setting(Place):
    """A number, a text or a small array that a call looks at: what was compiled has it as a
    constant. ``now`` is what it was, also of an array that is written to; ``own``: that of one
    object, and not of all in a process that look there."""

    now: Any
    own: bool

    def is_there(self) -> bool:
        """Whether it is the same."""
        found = _found(self.space, self.key)
        if found is self.value and not _is_array(found):
            return True
        return bool(_as_it_is_now(found) == self.now)

    @property
    def told(self) -> tuple[Any, ...]:
        """Equal where it is the same."""
        space = self.space.own if isinstance(self.space, _Inherited) else self.space
        return self.key, id(space), self.now


@dataclass(frozen=True, eq=False)
class _Inherited:
    """Attributes of an object that are its class's until it has its own."""

    own: dict[str, Any]
    of_class: Any


def settings(model: Any, methods: Iterable[str]) -> list[Place]:
    """What calls of these methods look at, and do not set themselves, in the model, its parts that
    are the user's, and the user's modules: plain values, which are compiled as constants, and
    variables, programs, functions, and what else is the user's or holds variables."""
    found: list[Place] = []
    seen = set()
    functions = [f for root in _called(model, methods) for f in _functions(root)]
    plain = list(dict.fromkeys(map(_plain, functions)))
    read, stored = _attributes(plain)
    spaces: list[tuple[Any, list[str]]] = []
    own: list[Any] = []
    for part in (model, *serialization.walk(model)):
        if part is model or not _is_of_a_library(type(part).__module__):
            own += [(space, [key]) for key in sorted(read - stored) for space in _own(part, key)]
    for function in plain:
        for space, keys in _spaces(function, function):
            if not isinstance(space, dict) or "__name__" in space:  # around it, or its module's
                spaces.append((space, [key for key in keys if key not in stored]))
    attributes = {id(space) for space, _ in own}
    for space, keys in (*own, *spaces):
        for key in keys:
            where = space.own if isinstance(space, _Inherited) else space
            if (id(where), key) not in seen:
                seen.add((id(where), key))
                attribute = id(space) in attributes
                found += _watched(space, key, _found(space, key), attribute=attribute)
    return found


def _own(part: Any, key: str) -> Iterator[Any]:
    """Where an object has an attribute that is not computed when it is asked for."""
    attributes = getattr(part, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    if key in attributes:
        yield attributes
        return
    for kind in type(part).__mro__:
        if key in vars(kind):
            if isinstance(vars(kind)[key], (*_SETTINGS, types.FunctionType)):
                yield _Inherited(attributes, vars(kind))
            return


def _watched(space: Any, key: str, value: Any, *, attribute: bool) -> Iterator[Place]:
    """The place, if a change of it would go unnoticed; whether it is an ``attribute`` of the
    model's, or of a part of it."""
    now = _as_it_is_now(value) if attribute or isinstance(value, _SETTINGS) else None
    if now is not None:
        yield Setting(space, key, value, now, attribute and isinstance(space, dict))
    elif not attribute:
        return
    elif type(value).__module__ == "strawberryfields.program":
        yield Program(space, key, value, len(value.circuit))
    elif not isinstance(value, _PLAIN) and not _is_an_engine(value):
        own = is_function(value) or not _is_of_a_library(type(value).__module__)
        if own or hasattr(value, "trainable_variables") or _variables(value):
            yield Place(space, key, value)


def _as_it_is_now(value: Any) -> Any:
    """What stays equal while a plain value or a small array does; None of anything else."""
    if isinstance(value, _SETTINGS):
        return value
    eager = type(value).__name__ == "EagerTensor"
    array = sys.modules["numpy"].asarray(value._numpy()) if eager else value
    if not _is_array(array) or array.size > _LARGEST or array.dtype.kind not in "biufc":
        return None
    return array.shape, array.dtype.str, array.tobytes()


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_an_engine(value: Any) -> bool:
    """Which are watched elsewhere (``qpool.engines``)."""
    return type(value).__module__ in ("strawberryfields.engine", "workers.engine.engine")


def constants(model: Any) -> tuple[tuple[str, str, Any], ...]:
    """The plain globals of imported modules that its calls look at, by module and name."""
    return tuple(
        (module, setting.key, setting.value)
        for setting in settings(model, ())
        if isinstance(setting, Setting)
        if (module := setting.space.get("__name__") if isinstance(setting.space, dict) else None)
        and module not in ("__main__", "__mp_main__")
        and setting.space is getattr(sys.modules.get(module), "__dict__", None)
    )


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
    """Have what a model calls be pickled with the variables that it leads to, not by the names
    under which another process would find it with variables of its own."""
    modules = {"__mp_main__"}  # the main script, in a child of multiprocessing's
    for root in _called(model):
        if any(_variables(place.value) for place in _places(root)):
            modules |= _modules(root)
    known = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    found = [sys.modules[name] for name in sorted(modules - known) if name in sys.modules]
    for module in found:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in found:
            cloudpickle.unregister_pickle_by_value(module)


def _called(model: Any, methods: Iterable[str] = ()) -> Iterator[Any]:
    """The functions that a model holds, and those of its parts' classes that a call of it may come
    to: by the names that it names."""
    parts = list(serialization.walk(model))
    yield from (f for f in parts if is_function(f) and not _is_of_a_library(_plain(f).__module__))
    kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__)
    own = [kind for kind in kinds if not _is_of_a_library(kind.__module__)]
    asked = {"__call__", "call", "generate", *getattr(model, "pooled_methods", ()), *methods}
    ahead = list(asked)
    while ahead:
        name = ahead.pop()
        for kind in own:
            given = vars(kind).get(name)
            function = getattr(given, "fget", None) or getattr(given, "__func__", given)
            if isinstance(function, types.FunctionType):
                yield function
                further = set(names(function.__code__)) - asked
                asked |= further
                ahead += further


def names(code: types.CodeType) -> Iterator[str]:
    """All names that a function, and those within it, may look up in its module, or in objects."""
    for part in _codes(code):
        yield from part.co_names


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Those of them that it does look up there: not names of attributes."""
    found = (
        instruction.argval
        for part in _codes(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return tuple(dict.fromkeys(found))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _attributes(functions: Iterable[types.FunctionType]) -> tuple[set[str], set[str]]:
    """Names of attributes that functions look at; of those, and of globals, that they set."""
    read: set[str] = set()
    stored: set[str] = set()
    for function in functions:
        for code in _codes(function.__code__):
            for instruction in dis.get_instructions(code):
                if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    read.add(instruction.argval)
                elif instruction.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
                    stored.add(instruction.argval)
    return read, stored


def _variables(value: Any) -> list[Any]:
    import tensorflow as tf

    return [part for part in serialization.walk(value) if isinstance(part, tf.Variable)]


def _layers(value: Any) -> Iterator[Any]:
    """What is called in turn, the Python function last."""
    yield value
    inner = None
    if isinstance(value, functools.partial):
        inner = value.func
    elif isinstance(value, types.MethodType):
        inner = value.__func__
    elif str(type(value).__module__).startswith("tensorflow."):
        inner = getattr(value, "python_function", None)
    if inner is not None:
        yield from _layers(inner)


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
                yield layer.__globals__, list(_globals_of(layer.__code__))


def _found(space: Any, key: str) -> Any:
    """What is there, None if nothing is."""
    if isinstance(space, dict):
        return space.get(key)
    if isinstance(space, _Inherited):
        return space.own[key] if key in space.own else space.of_class.get(key)
    with contextlib.suppress(ValueError):  # an empty cell
        return space.cell_contents
    return None


def _modules(root: Any) -> set[str]:
    """Those of the user's functions that it calls."""
    plain = map(_plain, _functions(root))
    return {f.__module__ for f in plain if _is_the_users(f, root)}


def _is_the_users(function: Any, root: Any) -> bool:
    """Whether it was written with what leads to it, or in no library."""
    module, own = (str(_plain(f).__module__) for f in (function, root))
    if module.partition(".")[0] == own.partition(".")[0]:
        return module.partition(".")[0] not in _OURS
    return not _is_of_a_library(module)


def _is_of_a_library(module: str) -> bool:
    """Or one of ours."""
    if module.partition(".")[0] in (*_OURS, "builtins"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)
