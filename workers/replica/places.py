"""Where something was found, and whether it is still there.

Owns what counts as the same: of a variable itself, of a number, an array or a program what it is.
Knows nothing of who looks there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What is compiled as a constant, and may be another one later.
PLAIN = (bool, int, float, complex, str)

#: Numbers of an array, and leaves of a list or dict, that are compared in each call.
_LARGEST, _MOST = 4096, 64

#: What may be written to, and hold something else while it is the same object.
_CONTAINERS = (list, tuple, dict, set, collections.deque)


@dataclass(frozen=True, eq=False)
class Place:
    """Something that a model or a function leads to, by the ``key`` of the ``space`` that it was
    found in: an object's attributes, a module's globals, or a variable of what is around it."""

    space: Any
    key: str
    value: Any

    @property
    def where(self) -> tuple[int, str]:
        """Which place it is, whatever is there."""
        own = isinstance(self.space, Inherited | Slots)
        return id(self.space.own if own else self.space), self.key

    @property
    def is_container(self) -> bool:
        """Whether a call may change it without binding it anew."""
        return isinstance(self.value, _CONTAINERS)

    def is_there(self) -> bool:
        """Whether it has not been bound anew."""
        return found_at(self.space, self.key) is self.value


@dataclass(frozen=True, eq=False)
class Kind(Place):
    """An object, the ``space``, and the class that it had."""

    def is_there(self) -> bool:
        return type(self.space) is self.value


@dataclass(frozen=True, eq=False)
class Program(Place):
    """A program of Strawberry Fields', the ``gates`` that it had, the ``parameters`` of these,
    which may be set in place, and numbers that were ``bound`` to free ones."""

    gates: tuple[Any, ...]
    parameters: list[Any]
    bound: tuple[Any, ...]

    @staticmethod
    def of(space: Any, key: str, value: Any) -> Program:
        return Program(space, key, value, gates_of(value), parameters_of(value), bound_to(value))

    def is_there(self) -> bool:
        """Whether it has those, or another one of them. What had none is built by the call."""
        found = found_at(self.space, self.key)
        if is_program(found) and bound_to(found) != self.bound:
            return False
        if found is self.value and _are(parameters_of(found), self.parameters):
            return True
        return type(found) is type(self.value) and self.gates in ((), gates_of(found))


@dataclass(frozen=True, eq=False)
class Setting(Place):
    """A number, a text, a small array, or a list or dict of them that a call looks at: what was
    compiled has it as a constant. ``now`` is what it was, also of one that is written to; ``own``:
    that of one object, and not of all in a process that look there."""

    now: Any
    own: bool

    def is_there(self) -> bool:
        """Whether it is the same."""
        found = found_at(self.space, self.key)
        if found is self.value and not isinstance(found, (np.ndarray, *_CONTAINERS)):
            return True
        return bool(as_it_is_now(found) == self.now)

    @property
    def told(self) -> tuple[Any, ...]:
        """Equal where it is the same."""
        return *self.where, self.now


@dataclass(frozen=True, eq=False)
class Contents(Place):
    """A list or dict of other things than numbers, and what was in it. What depends on it is made
    anew altogether when it is another one."""

    now: Any

    def is_there(self) -> bool:
        """Whether the same is in it, or in another one in its place."""
        return bool(as_it_is_now(found_at(self.space, self.key), others=True) == self.now)


@dataclass(frozen=True, eq=False)
class Inherited:
    """Attributes of an object that are its ``kind``'s until it has its own."""

    own: dict[str, Any]
    kind: type

    @functools.cached_property
    def owners(self) -> tuple[Any, ...]:
        """Who may have it, the first one first."""
        return self.own, *map(vars, self.kind.__mro__)


@dataclass(frozen=True, eq=False)
class Slots:
    """Attributes of an object that has them in slots."""

    own: Any


def found_at(space: Any, key: str) -> Any:
    """What is there, None if nothing is."""
    if isinstance(space, dict):
        return space.get(key)
    if isinstance(space, Slots):
        return getattr(space.own, key, None)
    if isinstance(space, Inherited):
        for owner in space.owners:
            if key in owner:
                return owner[key]
        return None
    with contextlib.suppress(ValueError):  # an empty cell
        return space.cell_contents
    return None


class _Itself:
    """Equal to that of the same object, whatever is in it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def as_it_is_now(value: Any, *, others: bool = False) -> Any:
    """What stays equal while a plain value, a small array, or a short list or dict of them does;
    None of anything else. ``others`` may be in a list or dict, too: each is what it is."""
    if isinstance(value, _CONTAINERS):
        return _contents(value, [_MOST], others=others)
    if isinstance(value, PLAIN):
        return value
    if type(value).__name__ == "EagerTensor":
        value = value._numpy()
    if not isinstance(value, np.ndarray | np.generic):
        return None
    array = np.asarray(value)
    if array.size > _LARGEST or array.dtype.kind not in "biufc":
        return None
    return array.shape, array.dtype.str, array.tobytes()


def _contents(value: Any, left: list[int], *, others: bool) -> Any:
    """As ``as_it_is_now``, of a list or dict with what is in it; ``left`` counts leaves down."""
    keys = list(value) if isinstance(value, dict) else []
    found: list[Any] = []
    for part in value.values() if isinstance(value, dict) else value:
        left[0] -= 1 + (part.size // _MOST if isinstance(part, np.ndarray) else 0)
        if left[0] < 0:
            return None
        if isinstance(part, _CONTAINERS):
            now = _contents(part, left, others=others)
        else:
            now = _Itself(part) if part is None else as_it_is_now(part)
            now = _Itself(part) if now is None and others else now
        if now is None:
            return None
        found.append(now)
    return type(value).__name__, tuple(keys), tuple(found)


def is_program(value: Any) -> bool:
    """One of Strawberry Fields'."""
    module = sys.modules.get("strawberryfields.program")
    return isinstance(module, types.ModuleType) and isinstance(value, module.Program)


def gates_of(program: Any) -> tuple[Any, ...]:
    """What is equal for programs that do the same: gates, the modes that they act on, numbers by
    their values, free parameters by their names, and anything else by what it is."""
    return tuple(
        (
            type(command.op),
            getattr(command.op, "dagger", False),
            tuple(register.ind for register in command.reg),
            tuple(map(_parameter, command.op.p)),
            repr(getattr(command.op, "select", None)),
        )
        for command in program.circuit
    )


def parameters_of(program: Any) -> list[Any]:
    """Of all gates, and where each of these begins."""
    return [value for command in program.circuit for value in (None, *command.op.p)]


def _are(values: list[Any], others: list[Any]) -> bool:
    return len(values) == len(others) and all(map(operator.is_, values, others))


def bound_to(program: Any) -> tuple[Any, ...]:
    """Numbers that are bound to its parameters, by their names, None for what is no plain one: what
    a run was given."""
    values = ((n, getattr(p, "val", None)) for n, p in program.free_params.items())
    return tuple((n, value if isinstance(value, int | float) else None) for n, value in values)


def _parameter(value: Any) -> Any:
    now = as_it_is_now(value)
    if now is not None:
        return now
    symbolic = type(value).__module__.partition(".")[0] in ("sympy", "strawberryfields")
    return str(value) if symbolic else id(value)
