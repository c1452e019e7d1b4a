"""What calls of a model look at, and what has to be made anew when it is something else.

Owns which places are looked at, in the model, its parts, their classes and the user's modules. What
is the same there is ``places``'; what a function leads to, ``functions``'.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from workers.replica import functions, serialization
from workers.replica.places import (
    Contents,
    Inherited,
    Kind,
    Place,
    Program,
    Setting,
    as_it_is_now,
    found_at,
    gates_of,
    is_program,
)

#: What a class has methods in.
_METHODS = (types.FunctionType, staticmethod, classmethod, property)


def watched(model: Any, methods: Iterable[str]) -> list[Place]:
    """What calls of these methods look at, and do not set themselves, in the model, its parts that
    are the user's, and the user's modules: plain values, which are compiled as constants, and
    variables, programs, functions, and what else is the user's or holds variables."""
    found: list[Place] = []
    seen = set()
    plain, classes = _reached(functions.called(model, methods))
    read, stored = functions.attributes(plain)
    keys = sorted(read - stored)
    looked_at: list[tuple[Any, str, bool]] = []  # whether it is an attribute
    for part in serialization.walk(model):
        own = not functions.is_of_a_library(type(part).__module__)
        if own:
            found.append(Kind(part, "__class__", type(part)))
        if own or part is model:
            looked_at += [(space, key, True) for key in keys for space in _own(part, key)]
    for kind in classes:
        looked_at += [(space, key, False) for key in keys for space in _inherited(kind, {}, key)]
    for function in plain:
        for space, keys in functions.spaces(function, function):
            if not isinstance(space, dict) or "__name__" in space:  # around it, or its module's
                looked_at += [(space, key, False) for key in keys if key not in stored]
    if (library := sys.modules.get("strawberryfields")) is not None:
        found.append(Contents(vars(library), "hbar", library.hbar, library.hbar))  # of a process
    for space, key, attribute in looked_at:
        where = Place(space, key, None).where
        if where not in seen:
            seen.add(where)
            found += _watched(space, key, found_at(space, key), attribute=attribute)
    return found


def _own(part: Any, key: str) -> Iterator[Any]:
    """Where an object has an attribute that is not computed when it is asked for."""
    attributes = getattr(part, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    if key in attributes:
        yield attributes
    else:
        yield from _inherited(type(part), attributes, key)


def _inherited(kind: type, own: dict[str, Any], key: str) -> Iterator[Inherited]:
    """Where an object with these ``own`` attributes, not among them, has it from."""
    for owner in kind.__mro__:
        if key in vars(owner):
            if _is_seen(vars(owner)[key], owner):
                yield Inherited(own, kind)
            return


def _reached(roots: Iterable[Any]) -> tuple[list[types.FunctionType], list[type]]:
    """The functions that calls may come to, and the user's classes that they find: also by the
    methods of those that they name."""
    plain: dict[Any, None] = {}
    classes: dict[type, None] = {}
    asked = set(functions.IMPLICIT)
    ahead = list(roots)
    while ahead:
        every = (f for root in ahead for f in functions.led_to(root))
        more = [f for f in dict.fromkeys(map(functions.plain, every)) if f not in plain]
        plain |= dict.fromkeys(more)
        asked.update(name for f in more for name in functions.names(f.__code__))
        classes |= dict.fromkeys(functions.classes_of(more))
        ahead = [f for kind in classes for f in functions.methods_of(kind, asked) if f not in plain]
    return list(plain), list(classes)


def _is_seen(value: Any, kind: type) -> bool:
    """Whether an attribute of a class is looked at for all of its objects: a method of a library's
    stays what it is."""
    if isinstance(value, _METHODS):
        return not functions.is_of_a_library(kind.__module__)
    return as_it_is_now(value) is not None


def _watched(space: Any, key: str, value: Any, *, attribute: bool) -> Iterator[Place]:
    """The place, if a change of it would go unnoticed; whether it is an ``attribute`` of the
    model's, or of a part of it."""
    now = as_it_is_now(value)
    if now is not None:
        yield Setting(space, key, value, now, attribute and isinstance(space, dict))
    elif (now := as_it_is_now(value, others=True)) is not None:
        yield Contents(space, key, value, now)
    elif is_program(value):
        yield Program(space, key, value, gates_of(value))
    elif isinstance(value, type):
        if not functions.is_of_a_library(value.__module__):
            yield Place(space, key, value)
    elif not isinstance(value, functions.CONSTANT) and not _is_an_engine(value):
        method = isinstance(value, _METHODS) or functions.is_function(value)
        own = method or not functions.is_of_a_library(type(value).__module__)
        if own or hasattr(value, "trainable_variables") or functions.variables(value):
            yield Place(space, key, value)


def _is_an_engine(value: Any) -> bool:
    """Which are watched elsewhere (``qpool.engines``)."""
    return type(value).__module__ in ("strawberryfields.engine", "workers.engine.engine")


def constants(model: Any) -> tuple[tuple[str, str, Any], ...]:
    """The plain globals of imported modules that its calls look at, by module and name."""
    return tuple(
        (module, setting.key, setting.value)
        for setting in watched(model, ())
        if isinstance(setting, Setting)
        if (module := setting.space.get("__name__") if isinstance(setting.space, dict) else None)
        and module not in ("__main__", "__mp_main__")
        and setting.space is getattr(sys.modules.get(module), "__dict__", None)
    )
