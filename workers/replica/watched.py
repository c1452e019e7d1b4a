"""What calls of a model look at, and what has to be made anew when it is something else.

Owns which places are looked at, in the model, its parts, their classes and the user's modules. What
is the same there is ``places``'; what a function leads to, ``functions``'.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from workers.replica import functions, serialization
from workers.replica.places import (
    Contents,
    Inherited,
    Kind,
    Place,
    Program,
    Setting,
    Slots,
    as_it_is_now,
    found_at,
    is_program,
)

#: What is too large to be looked into, and may be bound anew.
_BOUND_ANEW = (np.ndarray, list, tuple, dict, set)

#: Parts of an object that is not the model's, at most: it may be a data set.
_MANY = 1000

#: Whose objects are not looked into: what they hold is theirs, and much.
_LARGE = ("tensorflow", "keras", "numpy", "strawberryfields", "sympy", "qpool", "workers")

#: What a class has methods in.
_METHODS = (types.FunctionType, staticmethod, classmethod, property)


def watched(model: Any, methods: Iterable[str]) -> tuple[list[Place], set[tuple[int, str]]]:
    """What calls of these methods look at, in the model, its parts, and the user's modules: plain
    values, which are compiled as constants, and variables, programs, functions, and what else is
    the user's or holds variables. And which of these (``Place.where``) calls may set themselves:
    that is to be seen."""
    found: list[Place] = []
    plain, classes, objects = _reached(functions.called(model, methods))
    read, stored, outside = functions.attributes(plain)
    looked_at: list[tuple[Any, str, bool]] = []  # whether it is an attribute of the model's
    parts = {id(part): part for part in serialization.walk(model)}
    reached = (itertools.islice(serialization.walk(value), _MANY) for value in objects)
    others = {id(part): part for every in reached for part in every}
    for number, part in (parts | others).items():
        if _is_the_users_class(type(part)):
            found.append(Kind(part, "__class__", type(part)))
        if part is model or _is_looked_at(part):
            keys = sorted(_keys(part, read))
            looked_at += [(s, key, number in parts) for key in keys for s in _own(part, key)]
            classes += filter(_is_the_users_class, getattr(part, "__dict__", {}).values())
    for kind in dict.fromkeys(classes):
        keys = sorted(read)
        looked_at += [(space, key, False) for key in keys for space in _inherited(kind, {}, key)]
    for function in plain:
        for space, keys in functions.spaces(function, function):
            if not isinstance(space, dict) or "__name__" in space:  # around it, or its module's
                looked_at += [(space, key, False) for key in keys if key not in outside]
    if (library := sys.modules.get("strawberryfields")) is not None:
        found.append(Contents(vars(library), "hbar", library.hbar, library.hbar))  # of a process
    seen = set()
    written: set[tuple[int, str]] = set()
    for space, key, attribute in looked_at:
        where = Place(space, key, None).where
        if where not in seen:
            seen.add(where)
            places = list(_watched(space, key, found_at(space, key), attribute=attribute))
            found += places
            if key in stored:
                written.add(where)
    return found, written


def _is_looked_at(part: Any) -> bool:
    """Whether its attributes are: the user's, and settings of whatever library."""
    return type(part).__module__.partition(".")[0] not in (*_LARGE, "builtins")


def _keys(part: Any, read: set[str]) -> set[str]:
    """The attributes that calls may look at: all of what computes them when it is asked."""
    computes = any(
        "__getattr__" in vars(kind)
        for kind in type(part).__mro__
        if not functions.is_of_a_library(kind.__module__)
    )
    return read | set(getattr(part, "__dict__", ())) if computes else read


def _own(part: Any, key: str) -> Iterator[Any]:
    """Where an object has an attribute that is not computed when it is asked for."""
    attributes = getattr(part, "__dict__", None)
    if isinstance(getattr(type(part), key, None), types.MemberDescriptorType):
        yield Slots(part)
    elif not isinstance(attributes, dict):
        return
    elif key in attributes:
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


def _reached(roots: Iterable[Any]) -> tuple[list[types.FunctionType], list[type], list[Any]]:
    """The functions that calls may come to; the user's classes that they find, also by the methods
    of those that they name; and objects of the user's classes that they find."""
    plain: dict[Any, None] = {}
    classes: dict[type, None] = {}
    objects: dict[int, Any] = {}
    asked = set(functions.IMPLICIT)
    ahead = list(roots)
    while ahead:
        every = [f for root in ahead for f in functions.led_to(root)]
        for value in (value for f in every for value in functions.found_by(f)):
            kinds = _classes(value)
            classes |= dict.fromkeys(kinds)
            if kinds and not isinstance(value, type):
                objects[id(value)] = value
        more = [f for f in dict.fromkeys(map(functions.plain, every)) if f not in plain]
        plain |= dict.fromkeys(more)
        asked.update(name for f in more for name in functions.names(f.__code__))
        ahead = [f for kind in classes for f in functions.methods_of(kind, asked) if f not in plain]
    return list(plain), list(classes), list(objects.values())


def _classes(value: Any) -> list[type]:
    """The user's, of a class that a function finds, or of an object of such a one."""
    found = value if isinstance(value, type) else type(value)
    return [kind for kind in found.__mro__ if _is_the_users_class(kind)]


def _is_the_users_class(value: Any) -> bool:
    return isinstance(value, type) and not functions.is_of_a_library(value.__module__)


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
        yield Program.of(space, key, value)
    elif isinstance(value, type):
        if _is_the_users_class(value):
            yield Place(space, key, value)
    elif value is None:
        if not isinstance(space, dict) or key in space:  # else it is one of Python's own
            yield Place(space, key, value)
    elif isinstance(value, _BOUND_ANEW) or type(value).__name__ == "EagerTensor":
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
        for setting in watched(model, ())[0]
        if isinstance(setting, Setting)
        if (module := setting.space.get("__name__") if isinstance(setting.space, dict) else None)
        and module not in ("__main__", "__mp_main__")
        and setting.space is getattr(sys.modules.get(module), "__dict__", None)
    )
