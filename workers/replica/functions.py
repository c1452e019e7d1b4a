"""Functions as models: what computes without being a class.

    weights = tf.Variable(...)
    engine = sf.Engine("tf", ...)

    def generate(z):
        ...engine.run(program, args={..., "w": weights[0]})...

Owns what a function leads to beside its arguments: variables and engines among the globals that it
uses, of its own module and of those of the user's that it calls, and in what it closes over.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping
from typing import Any

import cloudpickle

from workers.replica import serialization
from workers.replica.places import Place, found_at

#: Where libraries lie, whose functions hold nothing of the user's; and packages that are ours.
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
_OURS = ("qpool", "workers")

CONSTANT = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)

#: Methods that are called without being named.
IMPLICIT = frozenset(
    f"__{name}__"
    for name in [
        "call",
        "getattr",
        "getattribute",
        "getitem",
        "contains",
        "iter",
        "next",
        "len",
        "bool",
        "float",
        "int",
        "index",
        "enter",
        "exit",
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "truediv",
        "rtruediv",
        "matmul",
        "rmatmul",
        "pow",
        "rpow",
        "neg",
    ]
)


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
            variable for variable in variables(self.reached) if variable.trainable
        ]
        self.__dict__.pop("trainable_variables", None)
        if found:
            self.trainable_variables = found
        return [place for place in places if variables(place.value)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def is_function(value: Any) -> bool:
    """Of Python's: also a method of an object, a partial one, and what ``tf.function`` makes."""
    return isinstance(plain(value), types.FunctionType)


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


def from_factory(
    factory: Callable[[], Any],
    wanted: dict[str, Any],
    constants: tuple[tuple[str, str, Any], ...] = (),
) -> serialization.Shipped:
    """Call the user's factory; what the model holds follows from walking what it made."""
    serialization.apply_settings(wanted)
    serialization.apply_constants(constants)
    made = serialization.inspect(as_model(factory()), wanted)
    made.constants = constants
    return made


@contextlib.contextmanager
def travelling(model: Any) -> Iterator[None]:
    """Have what a model calls be pickled with the variables that it leads to, not by the names
    under which another process would find it with variables of its own."""
    modules = {"__mp_main__"}  # the main script, in a child of multiprocessing's
    for root in called(model):
        if any(variables(place.value) for place in _places(root)):
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


def called(model: Any, methods: Iterable[str] = ()) -> Iterator[Any]:
    """The functions that a model holds, and those of its parts' classes that a call of it may come
    to: by the names that it names."""
    parts = list(serialization.walk(model))
    yield from (f for f in parts if is_function(f) and not is_of_a_library(plain(f).__module__))
    kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__)
    own = [kind for kind in kinds if not is_of_a_library(kind.__module__)]
    asked = {"call", "generate", *IMPLICIT, *getattr(model, "pooled_methods", ()), *methods}
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


class Bound(MutableMapping[str, Any]):
    """Names that functions bind anew in their module (``global last``)."""

    def __init__(self, module: dict[str, Any], names: Iterable[str]) -> None:
        self.module, self._names = module, tuple(names)

    def __getitem__(self, name: str) -> Any:
        return self.module[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.module[name] = value

    def __delitem__(self, name: str) -> None:
        del self.module[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self.module)

    def __len__(self) -> int:
        return len(list(iter(self)))


def containers(model: Any, method: str) -> dict[str, Any]:
    """What a call of this method may fill in the user's modules, by name: lists, dicts and deques,
    and by their number the names that it binds."""
    roots = [model] if is_function(model) else list(called(model, (method,)))
    found = {
        place.key: place.value
        for root in roots
        for place in _places(root)
        if type(place.value) in (list, dict, collections.deque)
    }
    bound: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in (plain(f) for root in roots for f in led_to(root)):
        if isinstance(function, types.FunctionType) and not is_of_a_library(function.__module__):
            names = set(_bound_by(function.__code__))
            if names:
                space = function.__globals__
                bound.setdefault(id(space), (space, set()))[1].update(names)
    return found | {f"module {n}": Bound(*of) for n, of in enumerate(bound.values())}


@functools.lru_cache(maxsize=4096)
def _bound_by(code: types.CodeType) -> tuple[str, ...]:
    """The names of its module that a function binds."""
    instructions = (i for part in _codes(code) for i in dis.get_instructions(part))
    return tuple({i.argval for i in instructions if i.opname == "STORE_GLOBAL"})


def found_by(function: Any) -> Iterator[Any]:
    """What a function finds by its names: around it, in its module, in what it is bound to."""
    for space, keys in spaces(function, function):
        for key in keys:
            yield found_at(space, key)


def methods_of(kind: type, asked: Container[str]) -> list[types.FunctionType]:
    """The functions of these names that a class defines itself."""
    given = (vars(kind)[name] for name in vars(kind) if name in asked)
    plain = (getattr(x, "fget", None) or getattr(x, "__func__", x) for x in given)
    return [function for function in plain if isinstance(function, types.FunctionType)]


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


def attributes(functions: Iterable[types.FunctionType]) -> tuple[set[str], set[str], set[str]]:
    """Names of attributes that functions look at, of attributes that they set, and of what they set
    in their modules or around them."""
    read: set[str] = set()
    stored: set[str] = set()
    outside: set[str] = set()
    for function in functions:
        for code in _codes(function.__code__):
            for instruction in dis.get_instructions(code):
                if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    read.add(instruction.argval)
                elif instruction.opname == "STORE_ATTR":
                    stored.add(instruction.argval)
                elif instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
                    outside.add(instruction.argval)
    return read, stored, outside


def variables(value: Any) -> list[Any]:
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


def plain(value: Any) -> Any:
    return list(_layers(value))[-1]


def led_to(root: Any) -> list[Any]:
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
    for function in led_to(root):
        for place in _places_of(function, root):
            if id(place.value) not in seen and not is_function(place.value):
                seen.add(id(place.value))
                yield place


def _places_of(function: Any, root: Any) -> Iterator[Place]:
    for space, keys in spaces(function, root):
        for key in keys:
            value = found_at(space, key)
            if not isinstance(value, CONSTANT):
                yield Place(space, key, value)


def spaces(function: Any, root: Any) -> Iterator[tuple[Any, list[str]]]:
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


def _modules(root: Any) -> set[str]:
    """Those of the user's functions that it calls."""
    return {f.__module__ for f in map(plain, led_to(root)) if _is_the_users(f, root)}


def _is_the_users(function: Any, root: Any) -> bool:
    """Whether it was written with what leads to it, or in no library."""
    module, own = (str(plain(f).__module__) for f in (function, root))
    if module.partition(".")[0] == own.partition(".")[0]:
        return module.partition(".")[0] not in _OURS
    return not is_of_a_library(module)


def is_of_a_library(module: str) -> bool:
    """Or one of ours."""
    if module.partition(".")[0] in (*_OURS, "builtins"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)
